//! The checked-in programs are what their sources compile to.
//!
//! Compared are instructions, what they refer to, and maps. Debug information has paths, so the
//! bytes of two files can differ.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionKind};

/// What a program does: code with references by section, then maps and the licence.
fn describe(bytes: &[u8]) -> BTreeMap<String, String> {
    let file = object::File::parse(bytes).unwrap();
    let mut found = BTreeMap::new();
    for section in file.sections() {
        let name = section.name().unwrap();
        let data = section.data().unwrap();
        if section.kind() != SectionKind::Text || data.is_empty() {
            continue;
        }
        found.insert(format!("code {name}"), format!("{data:02x?}"));
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(index) = relocation.target() else { panic!("{name}") };
            let symbol = file.symbol_by_index(index).unwrap();
            let target = symbol
                .section_index()
                .map(|index| file.section_by_index(index).unwrap().name().unwrap().to_owned());
            let to = format!("{:?} in {target:?} at {}", symbol.name(), symbol.address());
            found.insert(format!("reference {name}+{offset}"), to);
        }
    }
    let parsed = aya_obj::Object::parse(bytes).unwrap();
    found.insert("licence".into(), format!("{:?}", parsed.license));
    for (name, map) in &parsed.maps {
        let (kind, flags) = (map.map_type(), map.map_flags());
        let (key, value, entries) = (map.key_size(), map.value_size(), map.max_entries());
        let text = format!("type {kind} flags {flags} key {key} value {value} entries {entries}");
        found.insert(format!("map {name}"), text);
    }
    found
}

#[test]
fn the_description_has_programs_maps_and_references() {
    let found = describe(dispatch_steer::OBJECT);
    for name in ["code sk_lookup", "code sockops", "code .text", "map listeners", "map owners"] {
        assert!(found.contains_key(name), "{name}: {:?}", found.keys());
    }
    assert_eq!(found["licence"], "\"Dual MIT/GPL\"");
    assert_eq!(found["map workers"], "type 2 flags 0 key 4 value 24 entries 1024");
    assert!(found.values().any(|to| to.contains("\"listeners\"")), "{found:?}");
}

#[test]
fn the_checked_in_object_is_what_the_sources_compile_to() {
    let installed = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
    let headers = Path::new("/usr/include/bpf/bpf_helpers.h").exists();
    if !["clang-14", "llvm-strip-14"].iter().all(installed) || !headers {
        test_support::skip("needs clang-14, llvm-14 and libbpf-dev");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("steer.bpf.o");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bpf/rebuild");
    let built = Command::new(script).arg(&out).output().unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let (ours, theirs) = (describe(dispatch_steer::OBJECT), describe(&std::fs::read(out).unwrap()));
    for (name, what) in &theirs {
        assert_eq!(ours.get(name), Some(what), "{name} differs: run steer/bpf/rebuild");
    }
    assert_eq!(ours.len(), theirs.len(), "run steer/bpf/rebuild");
}
