//! `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` with any values, in a process with any
//! descriptors.
//!
//! The descriptors are simulated: a real one that is taken by mistake would be the fuzzer's own.

use std::cell::Cell;
use std::io;

use super::dispatcher_fuzzing::announced;

const OWN: u32 = 4242;

/// The input: a byte that selects the variables, their values as three lines, and then a byte for
/// each descriptor from 3 on: 0 if it is not open, odd if it was passed, even if it belongs to this
/// process.
pub fn listen_fds(data: &[u8]) {
    let Some((set, rest)) = data.split_first() else {
        return;
    };
    let mut parts = rest.splitn(4, |&byte| byte == b'\n');
    let mut part = || parts.next().unwrap_or_default();
    let variables = [0, 1, 2].map(|bit| {
        let value = String::from_utf8_lossy(part()).into_owned();
        (set >> bit & 1 == 1).then_some(value)
    });
    let table = part();
    let asked = Cell::new(0);
    let was_passed = |number: i32| {
        asked.set(asked.get() + 1);
        let place = usize::try_from(number - 3).expect("never one of the first three");
        match table.get(place) {
            Some(state) if state % 2 == 1 => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::NotFound)),
        }
    };
    let result = announced(variables.clone(), OWN, was_passed);
    // The number of examined descriptors does not depend on the announced number: the existing ones
    // and the first that is not open.
    assert!(asked.get() <= table.len() + 1);

    let [pid, count, names] = variables;
    let meant = pid.is_some_and(|pid| pid.parse() == Ok(OWN));
    let count = count.and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
    let passed = table.iter().take_while(|&state| state % 2 == 1).count();
    let named = names.as_ref().is_none_or(|names| names.split(':').count() == count);
    match result {
        Ok(found) if found.is_empty() => assert!(!meant || count == 0),
        Ok(found) => {
            assert!(meant && named && found.len() == count && count <= passed);
            assert!(found.iter().map(|(number, _)| *number).eq((3..).take(count)));
            let given: Vec<&str> = found.iter().map(|(_, name)| name.as_str()).collect();
            match names {
                Some(names) => assert_eq!(given.join(":"), names),
                None => assert!(given.iter().all(|&name| name == "unknown")),
            }
        }
        Err(why) => assert!(!(why.is_empty() || meant && named && (1..=passed).contains(&count))),
    }
}
