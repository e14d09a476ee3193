//! The recipes of docs/PROCESSES.md, run as they are written there: only the paths differ.

use super::*;

const PAGE: &str = include_str!("../../../docs/PROCESSES.md");

/// The blocks of the page in TOML.
fn recipes() -> Vec<&'static str> {
    let blocks = PAGE.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.filter(|block| block.contains("/usr/bin/my-server")).collect()
}

#[test]
fn every_recipe_serves() {
    assert!(recipes().len() >= 4);
    for recipe in recipes() {
        if recipe.contains("user = ") && !geteuid().is_root() {
            skip("needs root");
            continue;
        }
        let temp = directory();
        let dir = temp.path().to_owned();
        // The server shows its arguments and what it can see.
        let kind = if recipe.contains("fork = true") { "prefork blocking" } else { "blocking" };
        let server = format!(
            "#!/bin/sh\necho \"$* in $PWD cache=$CACHE\"\nexec {}/test-worker {kind}\n",
            dir.display()
        );
        std::fs::write(dir.join("my-server"), server).unwrap();
        std::fs::set_permissions(dir.join("my-server"), Permissions::from_mode(0o755)).unwrap();
        for number in 1..=4 {
            std::fs::create_dir_all(dir.join(format!("srv/web-{number}"))).unwrap();
        }
        let recipe =
            recipe.replace("/usr/bin/my-server", "DIR/my-server").replace("/srv/", "DIR/srv/");
        let log = if recipe.contains("output = ") { "" } else { "output = \"log\"\n" };
        // Tables come after keys.
        let recipe = recipe.replacen("command = ", &format!("{log}command = "), 1);
        let dispatcher = start(temp, &one_pool(&recipe));
        let processes = recipe.lines().find_map(|line| line.strip_prefix("processes = "));
        let count = processes.map_or(1, |count| count.parse().unwrap());
        dispatcher.wait_joined("web", count);
        let mut clients: Vec<Client> =
            (0..count).map(|_| Client::connect(dispatcher.address("web")).unwrap()).collect();
        clients.iter_mut().for_each(|client| client.echo("served"));
        let first = pid(&dispatcher, "web-1");
        wait_for_log(&dispatcher, &format!("event=process_output pool=web name=web-1 pid={first}"));
        if recipe.contains("{name}") {
            let line = format!(
                "line=\"--metrics-port 912 --log-name=web-2 in {}/srv/web-2 cache=/var/cache/web/2\"",
                dir.display()
            );
            wait_for_log(&dispatcher, &line);
        }
        if recipe.contains("user = \"nobody\"") {
            assert_eq!(words(first, "status", "Uid:"), ["65534"; 4]);
            assert_eq!(words(first, "status", "Umask:"), ["0027"]);
        }
        if recipe.contains("memory = \"8GiB\"") {
            assert_eq!(words(first, "limits", "Max address space")[0], "8589934592");
            assert_eq!(words(first, "limits", "Max open files")[..2], ["1024", "4096"]);
        }
    }
}
