//! `dispatcher doctor`: what the machine has, and what is missing, also where it is simulated.

use super::*;

/// The findings of a part by name: whether it is there, what was found, what to do.
type Findings = std::collections::BTreeMap<String, (bool, String, String)>;

fn doctor(command: &mut Command) -> (i32, bool, Findings) {
    let ran = finish(command);
    let json: serde_json::Value = serde_json::from_str(&ran.out).expect(&ran.err);
    assert_eq!(json["pass"]["ok"], true, "{json}");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let findings = json["steer"]["findings"].as_array().unwrap().iter().map(|one| {
        let what = (one["ok"].as_bool().unwrap(), text(&one["found"]), text(&one["remedy"]));
        assert_eq!(what.0, what.2.is_empty(), "a remedy for what is missing, only: {one}");
        (text(&one["name"]), what)
    });
    (ran.code, json["steer"]["ok"].as_bool().unwrap(), findings.collect())
}

#[test]
fn missing_things_are_named_with_their_remedy() {
    let temp = tempfile::tempdir().unwrap();
    let mounts = temp.path().join("mounts");
    std::fs::write(&mounts, "cgroup /sys/fs/cgroup/pids cgroup rw 0 0\n").unwrap();
    let absent = temp.path().join("absent");
    let (code, ok, found) = doctor(
        Command::new(dispatcher_bin())
            .args(["doctor", "--json", "--btf"])
            .arg(&absent)
            .arg("--bpffs")
            .arg(temp.path())
            .arg("--mounts")
            .arg(&mounts),
    );
    assert_eq!((code, ok), (0, false), "passing does not need them");
    let (there, what, remedy) = &found["btf"];
    assert!(!there && what.contains("absent: No such file"), "{what}");
    assert!(remedy.contains("CONFIG_DEBUG_INFO_BTF=y"), "{remedy}");
    let (there, what, remedy) = &found["bpffs"];
    assert!(!there && what.contains("steering ends with the dispatcher's process"), "{what}");
    assert_eq!(remedy, &format!("mount it: mount -t bpf bpf {}", temp.path().display()));
    assert_eq!(found["cgroup2"].1, "cgroup v2 is not mounted");
    assert!(!found.contains_key("programs"), "not tried where something is missing");
}

#[test]
fn an_ordinary_user_learns_how_to_grant_capabilities() {
    if !geteuid().is_root() {
        skip("becoming an ordinary user needs root");
        return;
    }
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(dispatcher_bin());
    let (code, ok, found) = doctor(command.args(["doctor", "--json"]).uid(65_534).gid(65_534));
    assert_eq!((code, ok), (0, false));
    for (name, capability) in [("cap_bpf", "CAP_BPF"), ("cap_net_admin", "CAP_NET_ADMIN")] {
        let (there, what, remedy) = &found[name];
        assert!(!there && what == &format!("{capability} is missing"), "{what}");
        assert!(remedy.contains("setcap cap_bpf,cap_net_admin+ep"), "{remedy}");
        assert!(remedy.contains("AmbientCapabilities=CAP_BPF CAP_NET_ADMIN"), "{remedy}");
    }
    let mut command = Command::new(dispatcher_bin());
    let ran = finish(command.arg("doctor").uid(65_534).gid(65_534));
    assert!(ran.out.contains("Passing connections to workers: possible\n"), "{}", ran.out);
    assert!(ran.out.contains("(steering): not possible\n"), "{}", ran.out);
    assert!(ran.out.contains("  missing cap_bpf"), "{}", ran.out);
}

#[test]
fn two_capabilities_are_enough_and_the_kernel_accepts_the_programs() {
    if !Command::new("setpriv").arg("--version").output().is_ok_and(|ran| ran.status.success()) {
        skip("needs setpriv");
        return;
    }
    let (_, able, found) = doctor(Command::new(dispatcher_bin()).args(["doctor", "--json"]));
    if !able {
        skip(&format!("this machine cannot steer: {found:?}"));
        return;
    }
    let capabilities = "-all,+bpf,+net_admin";
    let (_, ok, found) = doctor(
        Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args([format!("--inh-caps={capabilities}"), format!("--ambient-caps={capabilities}")])
            .arg(dispatcher_bin())
            .args(["doctor", "--json"]),
    );
    assert!(ok, "{found:?}");
    assert_eq!(found["programs"].1, "the kernel accepts them");
}
