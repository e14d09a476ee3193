//! Completions, manual pages and `--help` exist for every command and are valid for their readers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use test_support::*;

fn dispatcher(arguments: &[&str]) -> Output {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// The commands that `--help` lists.
fn commands() -> Vec<String> {
    let help = text(dispatcher(&["--help"]));
    let (_, list) = help.split_once("Commands:\n").unwrap();
    let lines = list.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| line.split_whitespace().next());
    let names: Vec<String> = names.filter(|name| *name != "help").map(str::to_owned).collect();
    for command in ["run", "check", "status", "drain", "resume", "reload", "completions", "man"] {
        assert!(names.iter().any(|name| name == command), "{command}: {names:?}");
    }
    names
}

#[test]
fn bash_completes_every_command() {
    if !has("bash") {
        return skip("needs bash");
    }
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("dispatcher");
    std::fs::write(&file, text(dispatcher(&["completions", "bash"]))).unwrap();
    let bash = |script: &str| {
        let mut command = Command::new("bash");
        command.args(["--norc", "--noprofile", "-c", script, "bash"]).arg(&file);
        text(command.output().unwrap())
    };
    assert!(bash("source \"$1\" && complete -p dispatcher").contains("dispatcher"));
    // Completes these words as the shell does after Tab.
    let complete = |words: &[&str]| {
        let words: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
        let call = format!(
            "source \"$1\"; COMP_WORDS=(dispatcher {}); COMP_CWORD={}; \
             f=$(complete -p dispatcher | sed 's/.*-F \\([^ ]*\\).*/\\1/'); \
             $f dispatcher \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[@]}}\"",
            words.join(" "),
            words.len()
        );
        bash(&call).split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    let offered = complete(&[""]);
    for command in commands() {
        assert!(offered.contains(&command), "{command}: {offered:?}");
    }
    assert!(!offered.iter().any(|word| word.contains("demo-worker")), "{offered:?}");
    assert_eq!(complete(&["stat"]), ["status"]);
    let options = complete(&["status", "--"]);
    assert!(options.contains(&"--json".to_owned()), "{options:?}");
}

#[test]
fn other_shells_have_scripts() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text(dispatcher(&["completions", shell]));
        // Run by its path, because it is not in PATH.
        assert!(script.contains(dispatcher_bin()), "{shell}: {script}");
        let script = text(dispatcher(&["completions", shell, "--program", "dispatcher"]));
        assert!(!script.contains(dispatcher_bin()), "{shell}: {script}");
    }
    // Without Tab, the script prints nothing.
    let mut command = Command::new(dispatcher_bin());
    command.args(["--", "dispatcher", "sta"]).env("_DISPATCHER_COMPLETE", "csh");
    assert_eq!(command.output().unwrap().status.code(), Some(64));
    let unknown = dispatcher(&["completions", "csh"]);
    assert_eq!(unknown.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("bash"));
}

/// The words that a shell offers for the last of these words.
fn offered(shell: &str, words: &[&str], admin: &Path) -> Vec<String> {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("script");
    std::fs::write(&file, text(dispatcher(&["completions", shell]))).unwrap();
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let (line, count) = (quoted.join(" "), words.len());
    let script = match shell {
        "bash" => format!(
            "source \"$FILE\"; COMP_WORDS=(dispatcher {line}); COMP_CWORD={count}; \
             _clap_complete_dispatcher dispatcher \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        ),
        // The completion functions of zsh work only in the line editor, so the test replaces them.
        "zsh" => format!(
            "compdef() {{}}; _describe() {{ print -rl -- ${{(P)3}} }}; source $FILE; \
             words=(dispatcher {line}); CURRENT={}; _clap_dynamic_completer_dispatcher",
            count + 1
        ),
        _ => format!("source $FILE; complete -C \"dispatcher {}\"", words.join(" ")),
    };
    let mut command = Command::new(shell);
    let quiet: &[&str] = match shell {
        "bash" => &["--norc", "--noprofile"],
        "zsh" => &["-f"],
        _ => &["--no-config"],
    };
    command.args(quiet).args(["-c", &script]).env("FILE", &file).env("HOME", temp.path());
    let printed = text(command.env("DISPATCHER_ADMIN", admin).output().unwrap());
    // Descriptions follow a tab or a colon.
    let words = printed.lines().map(|line| line.split(['\t', ':']).next().unwrap().trim());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

#[test]
fn shells_complete_the_names_of_workers_pools_and_levels() {
    let dispatcher = Dispatcher::start(&format!(
        "{}\n[[listener]]\nname = \"other\"\naddress = \"127.0.0.1:0\"\npool = \"chat\"\n[pool.chat]\n",
        one_pool("")
    ));
    // A name with special characters, and two workers with the same name.
    let mut processes = Vec::new();
    for name in ["web-1", "a;b$(c)", "same-name", "same-name"] {
        processes.push(dispatcher.worker("blocking", "web", name));
        dispatcher.wait_joined("web", processes.len());
    }
    let status = dispatcher.status();
    let id = |name: &str| {
        let of_name = pool(&status, "web").workers.iter().filter(move |w| w.name == name);
        of_name.map(|worker| worker.id.to_string()).collect::<Vec<_>>()
    };
    let mut workers = vec!["web/web-1".to_owned()];
    workers.extend(id("a;b$(c)"));
    workers.extend(id("same-name"));
    workers.sort();
    for shell in ["bash", "zsh", "fish"] {
        if !has(shell) {
            skip(&format!("needs {shell}"));
            continue;
        }
        let admin = dispatcher.admin();
        let sorted = |words: &[&str]| {
            let mut offered = offered(shell, words, &admin);
            offered.retain(|word| !word.starts_with('-'));
            offered.sort();
            offered
        };
        for command in ["drain", "resume", "weight"] {
            assert_eq!(sorted(&[command, ""]), workers, "{shell} {command}");
        }
        assert_eq!(sorted(&["drain", "web/w"]), ["web/web-1"], "{shell}");
        assert_eq!(sorted(&["drain", "--pool", ""]), ["chat", "web"], "{shell}");
        for command in ["scale", "history", "explain", "advice"] {
            assert_eq!(sorted(&[command, ""]), ["chat", "web"], "{shell} {command}");
        }
        assert_eq!(sorted(&["workers", "--pool", "c"]), ["chat"], "{shell}");
        assert_eq!(sorted(&["log-level", "d"]), ["debug"], "{shell}");
        assert_eq!(sorted(&["log-level", ""]).len(), 6, "{shell}");
        assert_eq!(sorted(&["stat"]), ["status"], "{shell}");
        // The names come from the dispatcher of the command line; without one there are none.
        let other = admin.with_file_name("none.sock");
        let here = admin.to_str().unwrap();
        assert_eq!(
            offered(shell, &["drain", "--admin", here, "web/w"], &other),
            ["web/web-1"],
            "{shell}"
        );
        assert_eq!(offered(shell, &["drain", "web/w"], &other), [] as [String; 0], "{shell}");
    }
}

/// The warnings of `man`.
fn complaints(page: &Path) -> String {
    let mut command = Command::new("groff");
    // All warnings, without output.
    command.args(["-man", "-Tutf8", "-ww", "-z"]).arg(page);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", page.display());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_command_has_a_manual_page() {
    let temp = tempfile::tempdir().unwrap();
    let directory = temp.path().join("man/man1");
    text(dispatcher(&["man", "--out", directory.to_str().unwrap()]));
    let entries = std::fs::read_dir(&directory).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut expected: Vec<String> =
        commands().iter().map(|command| format!("dispatcher-{command}.1")).collect();
    expected.push("dispatcher.1".to_owned());
    expected.sort();
    assert_eq!(names, expected);
    for name in &names {
        let page = std::fs::read_to_string(directory.join(name)).unwrap();
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "SEE ALSO"] {
            let heading = format!(".SH {section}\n");
            let quoted = format!(".SH \"{section}\"\n");
            assert!(page.contains(&heading) || page.contains(&quoted), "{name}: {section}");
        }
        assert!(page.contains(".SH EXAMPLE"), "{name}");
        assert!(!page.contains("demo\\-worker") && !page.contains("demo-worker"), "{name}");
    }
    // The page on standard output is the same.
    let whole = text(dispatcher(&["man"]));
    assert_eq!(whole, std::fs::read_to_string(directory.join("dispatcher.1")).unwrap());
    let drain = text(dispatcher(&["man", "drain"]));
    assert_eq!(drain, std::fs::read_to_string(directory.join("dispatcher-drain.1")).unwrap());
    assert_eq!(dispatcher(&["man", "nothing"]).status.code(), Some(64));
    // The page of the configuration is in section 5.
    let file = temp.path().join("man/man5/dispatcher.toml.5");
    let page = text(dispatcher(&["man", "dispatcher.toml"]));
    assert_eq!(page, std::fs::read_to_string(&file).unwrap());
    let flat = temp.path().join("flat");
    text(dispatcher(&["man", "--out", flat.to_str().unwrap()]));
    assert_eq!(page, std::fs::read_to_string(flat.join("dispatcher.toml.5")).unwrap());
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../etc/dispatcher.toml");
    let sample = std::fs::read_to_string(sample).unwrap();
    let keys = sample.lines().filter_map(|line| {
        let name = line.strip_prefix('#').unwrap_or(line).split_once('=')?.0.trim_end();
        name.bytes()
            .all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
            .then_some(name)
    });
    let keys: Vec<&str> = keys.collect();
    assert!(keys.len() > 60, "{keys:?}");
    for key in keys {
        assert!(page.contains(&format!("\\fB{key} = ")), "{key}");
    }
    for section in ["NAME", "DESCRIPTION", "FILES", "SEE ALSO"] {
        let headings = [format!(".SH {section}\n"), format!(".SH \"{section}\"\n")];
        assert!(headings.iter().any(|heading| page.contains(heading)), "{section}");
    }
    if !has("groff") {
        return skip("needs groff");
    }
    for name in &names {
        assert_eq!(complaints(&directory.join(name)), "", "{name}");
    }
    assert_eq!(complaints(&file), "");
    let mut command = Command::new("groff");
    let shown = text(command.args(["-man", "-Tascii", "-P-cbou"]).arg(&file).output().unwrap());
    let plain: String = shown.lines().map(|line| format!("{line}\n")).collect();
    for part in ["handoff_timeout", "least-connections", "[pool.NAME.affinity]", "dispatcher(1)"] {
        assert!(plain.contains(part), "{part}: {plain}");
    }
}

#[test]
fn every_command_has_help() {
    for command in commands() {
        let help = text(dispatcher(&[&command, "--help"]));
        assert!(help.contains("\nExample"), "{command}: {help}");
        let usage = format!("Usage: dispatcher {command}");
        assert!(help.contains(&usage) && !help.starts_with("Usage"), "{command}: {help}");
        // Every example belongs to this command.
        let (_, examples) = help.split_once("\nExample").unwrap();
        assert!(examples.contains(&format!("dispatcher {command}")), "{command}: {help}");
    }
}
