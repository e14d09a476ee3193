//! What a machine needs for steering, and what it has.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// `statfs` of cgroup v2.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// `statfs` of bpffs.
const BPFFS_MAGIC: u64 = 0xcafe_4a11;

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// The oldest kernel: `bpf_loop`, and the fields of contexts that the programs read.
const KERNEL: (u32, u32) = (5, 17);

/// How bpffs is provided.
pub(crate) const MOUNT_BPFFS: &str = "mount it: mount -t bpf bpf /sys/fs/bpf";

/// Where the machine describes itself.
#[derive(Clone, Debug)]
pub struct Places {
    /// The type information of the kernel.
    pub btf: PathBuf,
    /// The mount point of bpffs.
    pub bpffs: PathBuf,
    /// The file systems that are mounted.
    pub mounts: PathBuf,
    /// The capabilities of the thread, among others.
    pub status: PathBuf,
    /// The user namespace of the thread.
    pub uid_map: PathBuf,
    /// The release of the kernel, as `uname -r` prints it.
    pub release: PathBuf,
}

impl Default for Places {
    fn default() -> Places {
        Places {
            btf: "/sys/kernel/btf/vmlinux".into(),
            bpffs: "/sys/fs/bpf".into(),
            mounts: "/proc/self/mounts".into(),
            status: "/proc/thread-self/status".into(),
            uid_map: "/proc/thread-self/uid_map".into(),
            release: "/proc/sys/kernel/osrelease".into(),
        }
    }
}

/// One thing that steering needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A name for programs: `kernel`, `cap_bpf`, …
    pub name: &'static str,
    /// Whether the machine has it.
    pub ok: bool,
    /// Steering works without it, with a loss that `found` states.
    pub optional: bool,
    /// What was found.
    pub found: String,
    /// What to do if it is missing.
    pub remedy: Option<String>,
}

impl Finding {
    fn new(name: &'static str, result: Result<String, (String, String)>) -> Finding {
        let (ok, found, remedy) = match result {
            Ok(found) => (true, found, None),
            Err((found, remedy)) => (false, found, Some(remedy)),
        };
        Finding { name, ok, optional: false, found, remedy }
    }
}

/// Everything that steering needs, in the order in which it is worth mending.
pub fn findings(places: &Places) -> Vec<Finding> {
    let mut all = vec![kernel(places), user_namespace(places)];
    all.extend(capabilities(places));
    all.extend([btf(places), cgroup2(places), bpffs(places)]);
    all
}

/// Loads the programs into the kernel and drops them again: the proof that they would work.
pub fn trial() -> Finding {
    let loaded = crate::steering::load_programs().and_then(|_| crate::shared::load_programs());
    let found = loaded.map(|_| "the kernel accepts them".to_owned()).map_err(|error| {
        let remedy = "grant what is missing above; if nothing is, report this message";
        (error.to_string(), remedy.to_owned())
    });
    Finding::new("programs", found)
}

/// What is missing and cannot be done without; each with its remedy.
pub(crate) fn missing(places: &Places) -> Vec<String> {
    let missing = findings(places).into_iter().filter(|finding| !finding.ok && !finding.optional);
    missing
        .map(|Finding { found, remedy, .. }| match remedy {
            Some(remedy) => format!("{found}: {remedy}"),
            None => found,
        })
        .collect()
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn unreadable(found: String) -> (String, String) {
    (found, "mount /proc".to_owned())
}

fn kernel(places: &Places) -> Finding {
    let result = read(&places.release).map_err(unreadable).and_then(|release| {
        let release = release.trim();
        if version(release).is_some_and(|version| version >= KERNEL) {
            return Ok(format!("Linux {release}"));
        }
        let found = format!("Linux {release}, older than {}.{}", KERNEL.0, KERNEL.1);
        Err((found, "update the kernel".to_owned()))
    });
    Finding::new("kernel", result)
}

/// Major and minor number of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn user_namespace(places: &Places) -> Finding {
    let result = read(&places.uid_map).map_err(unreadable).and_then(|map| {
        let words: Vec<&str> = map.split_whitespace().collect();
        if words == ["0", "0", "4294967295"] {
            return Ok("the one of the machine".to_owned());
        }
        let found = "in a user namespace, where capabilities do not count for BPF";
        let remedy = "run outside of it: a container as root of the machine, without userns-remap \
                      or rootless mode";
        Err((found.to_owned(), remedy.to_owned()))
    });
    Finding::new("user_namespace", result)
}

fn capabilities(places: &Places) -> [Finding; 2] {
    let set = read(&places.status).map_err(unreadable).and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let set = line.and_then(|line| u64::from_str_radix(line.trim(), 16).ok());
        set.ok_or_else(|| unreadable(format!("{}: no CapEff", places.status.display())))
    });
    let one = |id, name, bit: u32| {
        let result = set.clone().and_then(|set| {
            // CAP_SYS_ADMIN includes both.
            if set & (1 << bit | 1 << CAP_SYS_ADMIN) != 0 {
                return Ok(format!("{name} is effective"));
            }
            Err((format!("{name} is missing"), GRANT.to_owned()))
        });
        Finding::new(id, result)
    };
    [one("cap_bpf", "CAP_BPF", CAP_BPF), one("cap_net_admin", "CAP_NET_ADMIN", CAP_NET_ADMIN)]
}

const GRANT: &str = "in the unit: AmbientCapabilities=CAP_BPF CAP_NET_ADMIN; for a program file: \
                     setcap cap_bpf,cap_net_admin+ep FILE; in a container: \
                     --cap-add BPF --cap-add NET_ADMIN";

fn btf(places: &Places) -> Finding {
    let result = match fs::metadata(&places.btf) {
        Ok(_) => Ok(places.btf.display().to_string()),
        Err(error) => Err((
            format!("no type information of the kernel (BTF): {}: {error}", places.btf.display()),
            "boot a kernel with CONFIG_DEBUG_INFO_BTF=y, and mount /sys".to_owned(),
        )),
    };
    Finding::new("btf", result)
}

fn cgroup2(places: &Places) -> Finding {
    let result = read(&places.mounts).map_err(unreadable).and_then(|mounts| {
        cgroup2_mount(&mounts).map(|path| path.display().to_string()).ok_or_else(|| {
            let found = "cgroup v2 is not mounted".to_owned();
            (found, "mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup".to_owned())
        })
    });
    Finding::new("cgroup2", result)
}

/// The first mount point of cgroup v2.
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let path = words.nth(1)?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(unescaped(path)))
    })
}

/// The cgroup v2 directory of this process, seen from its mount point.
///
/// # Errors
///
/// cgroup v2 is not mounted, or `/proc` is not.
pub fn own_cgroup() -> std::io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mount = cgroup2_mount(&mounts);
    let mount = mount.ok_or_else(|| std::io::Error::other("cgroup v2 is not mounted"))?;
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    // A process outside of its cgroup namespace has `..` in its path.
    let path = path.trim_end_matches(" (deleted)").trim_start_matches('/');
    let directory = mount.join(path);
    Ok(if directory.is_dir() { directory } else { mount })
}

/// A path of /proc/mounts: blanks, tabs, newlines and backslashes are three octal digits.
fn unescaped(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(path.to_owned(), |path, (code, character)| path.replace(code, character))
}

fn bpffs(places: &Places) -> Finding {
    let result = if is_bpffs(&places.bpffs) {
        Ok(places.bpffs.display().to_string())
    } else {
        let path = places.bpffs.display();
        let found =
            format!("bpffs is not mounted at {path}: steering ends with the dispatcher's process");
        Err((found, format!("mount it: mount -t bpf bpf {path}")))
    };
    Finding { optional: true, ..Finding::new("bpffs", result) }
}

pub(crate) fn is_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| found.f_type as u64 & 0xffff_ffff == BPFFS_MAGIC)
}

pub(crate) fn is_cgroup2(directory: impl AsFd) -> bool {
    let found = rustix::fs::fstatfs(directory);
    found.is_ok_and(|found| found.f_type as u64 == CGROUP2_MAGIC)
}

#[cfg(test)]
mod tests;
