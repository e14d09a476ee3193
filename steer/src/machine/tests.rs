use std::collections::BTreeMap;

use super::*;

/// Files that describe a machine which has everything, except bpffs.
fn complete(folder: &Path) -> Places {
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    Places {
        btf: write("btf", ""),
        bpffs: folder.into(),
        mounts: write("mounts", "proc /proc proc rw 0 0\nc /sys/a\\040b cgroup2 rw 0 0\n"),
        status: write("status", "Name:\tx\nCapEff:\t0000008000001000\n"),
        uid_map: write("uid_map", "         0          0 4294967295\n"),
        release: write("release", "5.17.0-1-amd64\n"),
    }
}

fn not_ok(places: &Places) -> Vec<&'static str> {
    findings(places).into_iter().filter(|f| !f.ok).map(|f| f.name).collect()
}

#[test]
fn nothing_is_missing_on_a_complete_machine_but_bpffs_which_is_optional() {
    let folder = tempfile::tempdir().unwrap();
    let places = complete(folder.path());
    assert_eq!(not_ok(&places), ["bpffs"]);
    assert!(missing(&places).is_empty());
    let found: BTreeMap<_, _> = findings(&places).into_iter().map(|f| (f.name, f.found)).collect();
    assert_eq!(found["kernel"], "Linux 5.17.0-1-amd64");
    assert_eq!(found["cgroup2"], "/sys/a b");
}

#[test]
fn each_missing_thing_is_named_with_a_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let good = complete(folder.path());
    let file = |text: &str| {
        let path = folder.path().join(format!("other-{}", text.len()));
        fs::write(&path, text).unwrap();
        path
    };
    let absent = || folder.path().join("absent");
    let cases = [
        ("kernel", Places { release: file("5.16.9"), ..good.clone() }, "update the kernel"),
        ("user_namespace", Places { uid_map: file("0 1000 1"), ..good.clone() }, "run outside"),
        ("cap_bpf", Places { status: file("CapEff:\t1000\n"), ..good.clone() }, "setcap cap_bpf"),
        (
            "cap_net_admin",
            Places { status: file("CapEff:\t8000000000\n"), ..good.clone() },
            "AmbientCapabilities=CAP_BPF CAP_NET_ADMIN",
        ),
        ("btf", Places { btf: absent(), ..good.clone() }, "CONFIG_DEBUG_INFO_BTF=y"),
        ("cgroup2", Places { mounts: file("a /b cgroup rw"), ..good.clone() }, "mount -t cgroup2"),
    ];
    for (name, places, remedy) in cases {
        assert_eq!(not_ok(&places), [name, "bpffs"]);
        let missing = missing(&places);
        assert!(missing.len() == 1 && missing[0].contains(remedy), "{missing:?}");
    }
    let administrator = Places { status: file("CapEff:\t0000000000200000\n"), ..good.clone() };
    assert_eq!(not_ok(&administrator), ["bpffs"], "CAP_SYS_ADMIN includes both");
    let nothing = Places { status: absent(), ..good };
    assert_eq!(not_ok(&nothing), ["cap_bpf", "cap_net_admin", "bpffs"]);
}

#[test]
fn releases() {
    assert_eq!(version("6.18.44-fc"), Some((6, 18)));
    assert_eq!(version("5.4"), Some((5, 4)));
    assert_eq!(version("unknown"), None);
}

/// The kernel checks at most a million instructions of a program, and follows more paths for users
/// without CAP_PERFMON, and in other versions.
#[test]
fn the_verifier_has_room() {
    let Ok((own, _)) = crate::steering::load_programs() else {
        return test_support::skip_on_this_kernel("programs cannot be loaded");
    };
    let loaded = own.programs().filter_map(|(name, program)| Some((name, program.info().ok()?)));
    let checked: Vec<_> = loaded
        .filter_map(|(name, info)| Some((name, info.verified_instruction_count()?)))
        .collect();
    assert!(checked.len() >= 2, "{checked:?}");
    assert!(checked.iter().all(|(_, count)| *count < 100_000), "{checked:?}");
}
