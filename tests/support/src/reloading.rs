//! Helpers for tests of reloads.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::{Dispatcher, dispatcher_bin, write_config};

pub fn run(dispatcher: &Dispatcher, arguments: &[&str]) -> Output {
    let mut command = Command::new(dispatcher_bin());
    command.args(arguments).env("DISPATCHER_ADMIN", dispatcher.admin()).stdin(Stdio::null());
    command.output().unwrap()
}

/// Reloads with this configuration, which must be valid; returns the changes.
pub fn reload(dispatcher: &Dispatcher, body: &str) -> Value {
    write_config(&dispatcher.dir, body);
    let output = run(dispatcher, &["reload", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn names(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect()
}

pub fn listener(name: &str, address: &str, pool: &str, keys: &str) -> String {
    format!(
        "[[listener]]\nname = \"{name}\"\naddress = \"{address}\"\npool = \"{pool}\"\n{keys}\n\n"
    )
}

/// The name of the worker that serves a connection. A worker does not know the names of listeners
/// that were added later.
pub fn served_by(stream: impl Read) -> String {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.split(' ').next().unwrap().to_owned()
}
