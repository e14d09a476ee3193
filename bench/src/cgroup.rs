//! A cgroup for the dispatcher and its workers, as a unit has one: programs on it see only their
//! sockets, not those of the clients.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A directory of cgroup v2 below that of this process. Removed when this is dropped; its processes
/// must have been told to end by then.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    pub fn new() -> io::Result<Cgroup> {
        let missing = || io::Error::other("cgroup v2 is not mounted");
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mounts.lines().find_map(mount_point).ok_or_else(missing)?;
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(missing)?;
        let path = Path::new(mount).join(own).join(format!("bench-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Cgroup { path })
    }

    /// Moves a process here; what it starts from now on stays here, too.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Moves this process to a cgroup.
pub fn join(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.procs"), std::process::id().to_string())
}

fn mount_point(line: &str) -> Option<&str> {
    let mut words = line.split(' ');
    let place = words.nth(1)?;
    (words.next()? == "cgroup2").then_some(place)
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The kernel takes out killed processes a moment later.
        let deadline = Instant::now() + Duration::from_secs(5);
        while let Err(error) = fs::remove_dir(&self.path) {
            if Instant::now() > deadline {
                eprintln!("bench: {}: {error}", self.path.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::mount_point;

    #[test]
    fn mount_points() {
        let line = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0";
        assert_eq!(mount_point(line), Some("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0"), None);
    }
}
