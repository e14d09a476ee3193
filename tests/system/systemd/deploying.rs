//! The recipe of docs/DEPLOYING.md for workers that are units, with the shipped template and a real
//! systemd: only the path of the program differs.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::*;

/// The commands of the recipe.
fn commands() -> Vec<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/DEPLOYING.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, rest) = page.split_once("\n## systemd units of your own\n").expect("the section");
    let (_, block) = rest.split_once("```console\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    // The file system of the machine is read-only, /run is not.
    let commands = block.lines().map(|line| line.strip_prefix("$ ").expect("only commands"));
    commands.map(|line| line.replace("/usr/local/bin/", "/run/bin/")).collect()
}

/// A version of the worker.
fn version(path: &Path, number: &str) {
    let text = format!("#!/bin/sh\nVERSION={number} exec /run/bin/test-worker blocking\n");
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
}

/// Also after a panic.
struct Set<'a>(&'a AtomicBool);

impl Drop for Set<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn names(machine: &Machine) -> Vec<String> {
    let status = machine.status().expect("a dispatcher");
    let workers = pool(&status, "web").workers.iter().filter(|it| it.state != "draining");
    let mut names: Vec<String> = workers.map(|worker| worker.name.clone()).collect();
    names.sort_unstable();
    names
}

#[test]
fn workers_that_are_units_get_a_new_version() {
    let Some(machine) = listening() else { return };
    let etc = Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc");
    let template = std::fs::read_to_string(etc.join("worker@.service")).unwrap();
    let template = template.replace("/usr/local/bin/my-worker", "/run/bin/my-worker");
    std::fs::write(machine.shared().join("units/worker@.service"), template).unwrap();
    machine.order(&["daemon-reload"]);
    version(&machine.inside("/run/bin/my-worker"), "1.4");
    version(&machine.shared().join("my-worker-1.5"), "1.5");
    machine.order(&["start", SERVICE, "worker@1.service", "worker@2.service"]);
    machine.wait_joined(2);
    assert_eq!(names(&machine), ["web-1", "web-2"]);
    let mut held = clients(&machine, 4);

    // No client is refused or reset meanwhile.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = Set(&over);
        let address = machine.address;
        let over = &over;
        let coming = scope.spawn(move || {
            let mut served = 0;
            while !over.load(Ordering::SeqCst) {
                let mut client = Client::connect(address).expect("neither refused nor reset");
                client.echo("a question");
                client.finish();
                served += 1;
            }
            served
        });
        for line in commands() {
            let script = format!("PATH=/run/bin:$PATH; cd /run/test; {line}");
            let output = machine.run("timeout", &["120", "sh", "-euc", &script]);
            assert!(output.status.success(), "{line}: {output:?}");
        }
        wait_until("the new ones alone", || names(&machine) == ["web-3", "web-4"]);
        held.iter_mut().for_each(|client| client.echo("it keeps its worker"));
        assert!(
            clients(&machine, 4)
                .iter()
                .all(|client| ["web-3", "web-4"].contains(&&*client.served_by))
        );
        over.store(true, Ordering::SeqCst);
        assert!(coming.join().unwrap() > 0);
    });

    // The old ones end with their last connection, and are not started again.
    held.into_iter().for_each(Client::finish);
    wait_until("the end of the old ones", || {
        ["worker@1.service", "worker@2.service"]
            .iter()
            .all(|unit| machine.state(unit) == "inactive")
    });
    let status = machine.wait_joined(2);
    for worker in &pool(&status, "web").workers {
        let environment = machine.inside(&format!("/proc/{}/environ", worker.pid));
        let environment = std::fs::read(environment).unwrap();
        let mut words = environment.split(|&byte| byte == 0);
        assert!(words.any(|word| word == b"VERSION=1.5"), "{}", worker.name);
    }
}
