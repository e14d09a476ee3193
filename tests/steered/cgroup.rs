//! Cgroups of a test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use test_support::{skip, wait_until};

/// A cgroup of its own; removed at the end.
pub struct Cgroup(pub PathBuf);

impl Cgroup {
    /// `None`, after a notice, if there is no place for one.
    pub fn new() -> Option<Cgroup> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = dispatch_steer::machine::cgroup2_mount(&mounts)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = mount.join(format!("dispatcher-members-{}-{number}", std::process::id()));
        match std::fs::create_dir(&path) {
            Ok(()) => Some(Cgroup(path)),
            Err(error) => {
                skip(&format!("{}: {error}", path.display()));
                None
            }
        }
    }

    /// A command that runs in a cgroup of this name below; its words are to be added.
    pub fn command(&self, name: &str) -> Command {
        let own = self.0.join(name);
        std::fs::create_dir_all(&own).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo 0 > \"$0\"/cgroup.procs && exec \"$@\""])
            .arg(&own)
            .stdin(Stdio::null());
        command
    }

    /// The member of this name.
    pub fn member(&self, name: &str, port: u16) -> String {
        format!(
            "[[pool.web.member]]\nname = \"{name}\"\naddress = \"127.0.0.1:{port}\"\n\
             cgroup = \"{}\"\n",
            self.0.join(name).display()
        )
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let remove = |path: &Path| std::fs::remove_dir(path).is_ok() || !path.exists();
        let below = std::fs::read_dir(&self.0).unwrap().flatten().filter(|it| it.path().is_dir());
        for entry in below {
            wait_until("the cgroup to be empty", || remove(&entry.path()));
        }
        wait_until("the cgroup to be empty", || remove(&self.0));
    }
}
