//! The metrics of the relay's directory; none without `relay_directory` and `relay_socket`.

use std::fmt;

use dispatch_directory::NUMBERS;

use super::Snapshot;
use super::page::Page;

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
            // A directory of another version may not tell all of them.
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
