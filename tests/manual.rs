//! Completions, manual pages and `--help`: there for every command, and good for the programs that read them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use support::*;

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
    // As the shell does when Tab is pressed after these words.
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
fn other_shells_have_theirs() {
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let script = text(dispatcher(&["completions", shell]));
        assert!(script.contains("status") && script.contains("json"), "{shell}");
        assert!(!script.contains("demo-worker"), "{shell}");
    }
    let unknown = dispatcher(&["completions", "csh"]);
    assert_eq!(unknown.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("bash"));
}

/// What `man` would complain of.
fn complaints(page: &Path) -> String {
    let mut command = Command::new("groff");
    // Every warning, and what it prints goes nowhere.
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
    // One page goes to standard output, and is the same.
    let whole = text(dispatcher(&["man"]));
    assert_eq!(whole, std::fs::read_to_string(directory.join("dispatcher.1")).unwrap());
    let drain = text(dispatcher(&["man", "drain"]));
    assert_eq!(drain, std::fs::read_to_string(directory.join("dispatcher-drain.1")).unwrap());
    assert_eq!(dispatcher(&["man", "nothing"]).status.code(), Some(64));
    if !has("groff") {
        return skip("needs groff");
    }
    for name in &names {
        assert_eq!(complaints(&directory.join(name)), "", "{name}");
    }
}

#[test]
fn every_command_explains_itself() {
    for command in commands() {
        let help = text(dispatcher(&[&command, "--help"]));
        assert!(help.contains("\nExample"), "{command}: {help}");
        let usage = format!("Usage: dispatcher {command}");
        assert!(help.contains(&usage) && !help.starts_with("Usage"), "{command}: {help}");
        // An example is of this command, or of what belongs to it.
        let (_, examples) = help.split_once("\nExample").unwrap();
        assert!(examples.contains(&format!("dispatcher {command}")), "{command}: {help}");
    }
}
