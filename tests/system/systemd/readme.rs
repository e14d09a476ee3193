//! The installation in the README on an empty machine: every command line as printed there.

use std::path::Path;

use super::*;

/// The lines of the first command block in this section.
fn commands(section: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let (_, rest) = readme.split_once(&format!("\n## {section}\n")).expect("the section");
    let (_, block) = rest.split_once("```sh\n").expect("a block");
    let (block, _) = block.split_once("```").expect("its end");
    block.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn the_readme_installation_works_unedited() {
    if !has("objcopy") || !has("ip") || !has("curl") {
        return skip("needs objcopy (binutils), ip (iproute2) and curl");
    }
    let Some(machine) = Machine::boot_to_install() else { return };
    // A clone with all build results, as after the first line; the test's own binaries are used.
    let clone = machine.shared().join("clone");
    let built = clone.join("target/release");
    std::fs::create_dir_all(built.join("examples")).unwrap();
    std::fs::copy(dispatcher_bin(), built.join("dispatcher")).unwrap();
    std::fs::copy(example("http"), built.join("examples/http")).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap();
    for name in ["etc", "docs", "README.md", "CHANGELOG.md", "SECURITY.md"] {
        std::os::unix::fs::symlink(root.join(name), clone.join(name)).unwrap();
    }
    let lines = commands("Set it up with systemd");
    assert_eq!(lines[0], "cargo build --release --bin dispatcher --example http");
    let mut answers = Vec::new();
    for line in &lines[1..] {
        let script = format!("unset CARGO_TARGET_DIR DISPATCHER_ADMIN; cd /run/test/clone; {line}");
        let output = machine.run("sh", &["-euc", &script]);
        let text =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "{line}: {text:?}");
        answers.push((line.as_str(), text));
    }
    let answer = |start: &str| {
        let found = answers.iter().find(|(line, _)| line.starts_with(start));
        found.unwrap_or_else(|| panic!("no {start} in {lines:?}")).1.clone()
    };
    // The check succeeds, and a worker has answered.
    let [out, err] = answer("dispatcher check");
    assert!(out.contains("dispatcher.toml: ok") && err.is_empty(), "{out} {err}");
    assert!(answer("curl ")[0].contains("connections held: 1; you are 127.0.0.1:"));
    assert!(answer("dispatcher status")[0].contains("web-"));
    let workers = || {
        let output = machine.run("dispatcher", &["workers"]);
        String::from_utf8(output.stdout).unwrap()
    };
    wait_until("both workers", || workers().matches(" active ").count() == 2);
    for unit in ["worker@1.service", "worker@2.service", SERVICE, SOCKETS[0], SOCKETS[1]] {
        assert_eq!(machine.state(unit), "active", "{unit}");
        let (enabled, _) = machine.systemctl(&["is-enabled", unit]);
        assert_eq!(enabled, "enabled", "{unit}");
    }

    // The installed files: stripped binaries with debug information beside them, and the documents
    // that the units name.
    let size = |path: &str| {
        machine.inside(path).metadata().unwrap_or_else(|e| panic!("{path}: {e}")).len()
    };
    let whole = built.join("dispatcher").metadata().unwrap().len();
    assert!(size("/usr/bin/dispatcher") < whole / 2, "{} of {whole}", size("/usr/bin/dispatcher"));
    assert!(size("/usr/lib/debug/usr/bin/dispatcher.debug") > size("/usr/bin/dispatcher"));
    let link = machine.run("objdump", &["-s", "-j", ".gnu_debuglink", "/usr/bin/dispatcher"]);
    assert!(String::from_utf8_lossy(&link.stdout).contains("dispatch"), "{link:?}");
    for path in [
        "/usr/share/bash-completion/completions/dispatcher",
        "/usr/share/zsh/vendor-completions/_dispatcher",
        "/usr/share/fish/vendor_completions.d/dispatcher.fish",
    ] {
        let script = std::fs::read_to_string(machine.inside(path)).unwrap();
        assert!(script.contains("dispatcher") && !script.contains("/clone/"), "{path}: {script}");
    }
    for unit in [SERVICE, SOCKETS[0], SOCKETS[1], "worker@1.service"] {
        let documentation = machine.show(unit, "Documentation");
        assert!(!documentation.is_empty(), "{unit}");
        for place in documentation.split_whitespace().map(|place| place.trim_matches('"')) {
            let path = match place.split_once(':') {
                Some(("file", path)) => path.trim_start_matches("//").to_owned(),
                Some(("man", page)) => {
                    let (name, section) = page.trim_end_matches(')').split_once('(').unwrap();
                    format!("/usr/share/man/man{section}/{name}.{section}")
                }
                _ => panic!("{unit}: {place}"),
            };
            assert!(size(&path) > 0, "{unit}: {place}");
        }
    }

    // Only this machine can connect, and a restart loses no connection.
    let listening = machine.show(SOCKETS[0], "Listen");
    assert_eq!(listening, "127.0.0.1:8080 (Stream)");
    let habit =
        "dispatcher check && systemctl restart dispatcher && curl -s http://127.0.0.1:8080/";
    let output = machine.run("sh", &["-euc", habit]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(machine.show("worker@1.service", "NRestarts"), "0");
    // A second installation keeps edited files.
    let edited = machine.inside("/etc/dispatcher/dispatcher.toml");
    let text = std::fs::read_to_string(&edited).unwrap();
    std::fs::write(&edited, format!("{text}\nhandoff_timeout = \"1s\"\n")).unwrap();
    let output =
        machine.run("sh", &["-euc", "cd /run/test/clone; unset CARGO_TARGET_DIR; etc/install.sh"]);
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read_to_string(&edited).unwrap().ends_with("handoff_timeout = \"1s\"\n"));

    // The other unit, as its head says.
    let unit = std::fs::read_to_string(root.join("etc/dispatcher-workers.service")).unwrap();
    let commands: Vec<&str> =
        unit.lines().filter_map(|line| line.strip_prefix("#   ")).skip(1).collect();
    assert!(commands[0].starts_with("systemctl disable --now"), "{commands:?}");
    assert!(commands[1].starts_with("for unit in"), "{commands:?}");
    let check = |machine: &Machine| {
        let output = machine.run("sh", &["-euc", "curl -s http://127.0.0.1:8080/"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(machine.state("dispatcher-workers.service"), "active");
        assert_eq!(machine.state(SERVICE), "inactive");
    };
    let output = machine.run("sh", &["-euc", &commands.join("\n")]);
    assert!(output.status.success(), "{commands:?}: {output:?}");
    check(&machine);
    // The script makes the same files.
    let place = |socket: &str| {
        machine.inside(&format!("/etc/systemd/system/{socket}.socket.d/workers.conf"))
    };
    let made = ["dispatcher", "dispatcher-dispatch"].map(|socket| {
        let text = std::fs::read_to_string(place(socket)).unwrap();
        std::fs::remove_file(place(socket)).unwrap();
        text
    });
    let install = "cd /run/test/clone; unset CARGO_TARGET_DIR; etc/install.sh --workers";
    let output = machine.run("sh", &["-euc", install]);
    assert!(output.status.success(), "{output:?}");
    let installed = ["dispatcher", "dispatcher-dispatch"]
        .map(|socket| std::fs::read_to_string(place(socket)).unwrap());
    assert_eq!(installed, made);
    check(&machine);
}

#[test]
fn all_documents_state_the_effect_of_a_restart() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for file in [
        "README.md",
        "docs/OPERATING.md",
        "etc/dispatcher.toml",
        "etc/dispatcher-systemd.toml",
        "etc/dispatcher.service",
        "etc/worker@.service",
    ] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let words: Vec<&str> = text.split_whitespace().filter(|word| *word != "#").collect();
        let words = words.join(" ");
        assert!(
            words.contains("by itself") || words.contains("join again by themselves"),
            "{file}"
        );
        if file != "etc/worker@.service" {
            let (_, after) = words.split_once("join again by themselves").expect(file);
            let near: String = after.chars().take(300).collect();
            assert!(
                near.contains("stopped with it") && near.contains("stop_timeout"),
                "{file}: {near}"
            );
        }
    }
}

fn has(program: &str) -> bool {
    std::process::Command::new(program).arg("--version").output().is_ok()
}
