//! The file with the key of tickets, which the dispatcher and the directory share.
//!
//! Whichever starts first makes it: 16 random bytes, readable by its user only. It is made complete
//! under another name and then linked, so that the other never reads half of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use dispatch_protocol::relay::ticket::{KEY, Key};

/// Reads the key, and makes it if there is none.
///
/// # Errors
/// The file cannot be read or made, has another size, or others can read or change it.
pub fn open(path: &Path) -> io::Result<Key> {
    match read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        read => return read,
    }
    let mut bytes = [0; KEY];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".{}", std::process::id()));
    let part = Path::new(&part);
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(part);
    let written = written.and_then(|mut file| file.write_all(&bytes));
    // A link fails if the other has made the key meanwhile; then that one counts.
    let linked = written.and_then(|()| std::fs::hard_link(part, path));
    let _ = std::fs::remove_file(part);
    match linked {
        Ok(()) => Ok(Key::new(bytes)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read(path),
        Err(error) => Err(error),
    }
}

fn read(path: &Path) -> io::Result<Key> {
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    let own = rustix::process::geteuid().as_raw();
    if !meta.is_file() || meta.mode() & 0o077 != 0 || (meta.uid() != own && meta.uid() != 0) {
        let problem = "it must be a file that only its user can read (chmod 600)";
        return Err(io::Error::other(problem));
    }
    let mut bytes = [0; KEY];
    file.read_exact(&mut bytes)?;
    if file.read(&mut [0])? != 0 {
        return Err(io::Error::other(format!("it must have {KEY} bytes")));
    }
    Ok(Key::new(bytes))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn whoever_starts_first_makes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("relay.key");
        let ticket = open(&path).unwrap().issue("web", 5);
        assert_eq!(open(&path).unwrap().pool(&ticket, 5), Some("web"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::write(&path, [0; KEY + 1]).unwrap();
        assert!(open(&path).is_err());
        std::fs::write(&path, [0; KEY - 1]).unwrap();
        assert!(open(&path).is_err());
    }
}
