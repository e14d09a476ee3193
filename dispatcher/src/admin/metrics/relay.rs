//! The metrics of the relay's directory; none without `relay_directory` and `relay_socket`.

use std::fmt;

use super::Snapshot;
use super::page::Page;

/// The numbers of the directory that are metrics, and what they mean. It may tell others later.
const NUMBERS: [(&str, &str); 17] = [
    ("ids", "Registered client ids of this host"),
    ("ids_in_grace", "Ids whose client has gone and may come back"),
    ("members", "Workers that are connected to the directory"),
    ("hosts", "Other hosts that are known"),
    ("groups", "Groups with members"),
    ("lookups_waiting", "Look-ups that wait for the end of a grace"),
    ("queued_bytes", "Bytes that wait to be sent to workers"),
    ("connections_waiting", "Connections that have not introduced themselves"),
    ("registered_total", "Registrations"),
    ("superseded_total", "Registrations that a newer one of the same id has ended"),
    ("lookups_total", "Look-ups of ids"),
    ("lookups_found_total", "Look-ups that found a registration"),
    ("lookups_waited_total", "Look-ups that waited for a client to come back"),
    ("links_total", "Links given to two workers"),
    ("not_accepted_total", "Registrations and memberships refused at a limit"),
    ("refused_total", "Connections refused"),
    ("cut_total", "Connections ended because they broke the protocol or did not read"),
];

impl Snapshot {
    pub(super) fn relay(&self, page: &mut Page<'_>) -> fmt::Result {
        let Some(relay) = &self.status.relay else { return Ok(()) };
        let up = i64::from(relay.state == "up");
        page.gauge("relay_up", "1 if the directory of the relay answers", None, up)?;
        if let Some(process) = &relay.process {
            let help = "Starts of the directory's process";
            page.counter("relay_process_starts", help, process.starts)?;
        }
        for (name, help) in NUMBERS {
            let Some(&value) = relay.numbers.get(name) else { continue };
            match name.strip_suffix("_total") {
                Some(family) => page.counter(&format!("relay_{family}"), help, value)?,
                None => {
                    let value = i64::try_from(value).unwrap_or(i64::MAX);
                    page.gauge(&format!("relay_{name}"), help, None, value)?;
                }
            }
        }
        Ok(())
    }
}
