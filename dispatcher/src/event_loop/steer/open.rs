//! Attaches the programs of a pool, pins them, or adopts those of an earlier dispatcher.

use std::path::Path;

use dispatch_steer::{Error, Options, Steering};

use super::thread::{Known, PoolMaps};
use super::{Opened, PoolSpec, pin_name};
use crate::background::logger::{quoted, value};

/// Attaches the programs, or adopts those of an earlier dispatcher.
pub(super) fn open(spec: PoolSpec) -> Result<(PoolMaps, Opened), String> {
    let mut opened = Opened::default();
    let cgroup = match &spec.cgroup {
        Some(cgroup) => cgroup.clone(),
        None => dispatch_steer::machine::own_cgroup().map_err(|error| error.to_string())?,
    };
    // Programs that are attached elsewhere would not count what the workers do here.
    let pins = spec.pins.as_ref().map(|pins| pins.join(pin_name(&cgroup.to_string_lossy())));
    if let (Some(all), Some(own)) = (&spec.pins, &pins) {
        remove_others(&spec.name, all, own)?;
    }
    let mut adopted = None;
    if let Some(pins) = pins.as_deref().filter(|pins| pins.exists()) {
        match Steering::adopt(pins) {
            Ok(steering) => adopted = Some(steering),
            Err(error) => {
                log::warn!(
                    "event=steer_not_adopted pool={} path={} error={}",
                    spec.name,
                    value(&pins.display()),
                    quoted(&error)
                );
                dispatch_steer::remove_pins(pins).map_err(|error| error.to_string())?;
            }
        }
    }
    let steering = match adopted {
        Some(steering) => {
            (opened.adopted, opened.pinned) = (true, true);
            steering
        }
        None => {
            let options = Options { cgroup: cgroup.clone(), wait: spec.wait };
            let load = || {
                let loaded = match spec.shared {
                    true => Steering::load_shared(&options),
                    false => Steering::load(&options),
                };
                loaded.map_err(|error| error.to_string())
            };
            match &pins {
                None => load()?,
                Some(pins) => pin(load()?, load, pins, &mut opened)?,
            }
        }
    };
    let mut pool = PoolMaps::new(spec, steering, cgroup);
    pool.recover().map_err(|error| error.to_string())?;
    let spec = pool.spec.clone();
    pool.change(spec).map_err(|error| error.to_string())?;
    opened.writer = Some(pool.steering.writer().map_err(|error| error.to_string())?);
    Ok((pool, opened))
}

/// Detaches programs of this pool that an earlier dispatcher attached to another cgroup.
fn remove_others(pool: &str, all: &Path, own: &Path) -> Result<(), String> {
    let Ok(entries) = std::fs::read_dir(all) else { return Ok(()) };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path != own) {
        log::warn!(
            "event=steer_not_adopted pool={pool} path={} error=\"they are attached to another cgroup\"",
            value(&path.display())
        );
        dispatch_steer::remove_pins(&path).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Pins the programs. Without pins the choice ends with the dispatcher, which is better than none.
fn pin(
    steering: Steering,
    again: impl FnOnce() -> Result<Steering, String>,
    pins: &Path,
    opened: &mut Opened,
) -> Result<Steering, String> {
    let made = match pins.parent() {
        Some(parent) => make_directory(parent),
        None => Ok(()),
    };
    let pinned = match made {
        Ok(()) => steering.pin(pins).map_err(|error| error.to_string()),
        Err(error) => {
            opened.not_pinned = Some(format!("{}: {error}", pins.display()));
            return Ok(steering);
        }
    };
    match pinned {
        Ok(steering) => {
            opened.pinned = true;
            Ok(steering)
        }
        Err(error) => {
            opened.not_pinned = Some(error);
            again()
        }
    }
}

/// Makes a directory and those above it that do not exist, for this user only.
fn make_directory(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

impl PoolMaps {
    /// The slots of an earlier dispatcher.
    fn recover(&mut self) -> Result<(), Error> {
        if self.spec.shared {
            return self.recover_shared();
        }
        for (address, number) in self.steering.addresses()? {
            // A worker has several addresses with one port.
            let known = self.slots.entry(number).or_insert_with(|| Known::new(address));
            known.freed = true;
            if address.ip() == self.spec.ip {
                known.address = address;
            }
        }
        Ok(())
    }
}
