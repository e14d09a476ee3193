//! The journal of processes that outlive the dispatcher: a later dispatcher finds them in it and
//! puts them back in their places.
//!
//! Guarantees: a process is in the journal before it runs its program, even if the dispatcher is
//! killed at that moment, because the child itself writes its process id. Only the holder of the
//! file's lock writes; a child that has not run its program yet holds the lock, too, so the next
//! dispatcher waits for it. Records of an earlier boot, and of processes whose id now belongs to
//! another process, are ignored.
//!
//! Needs a directory that only the dispatcher's user can write to. Each line is one record:
//!
//! ```text
//! dispatcher-processes 1 BOOT_ID
//! start TOKEN PLACE START POOL      a process is about to be started
//! generation TOKEN GENERATION       its generation
//! address TOKEN ADDRESS             where it listens, in a steered pool
//! pid TOKEN PID [STARTED]           its process id, and when the kernel started it
//! leaving TOKEN                     it gets no more connections
//! stays TOKEN                       it gets connections again
//! end TOKEN                         it has ended
//! deploys JSON                      the generations of a pool, and its last roll
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use dispatch_protocol::wire::Token;
use rustix::fs::{FlockOperation, flock};

use super::deploys::Deploys;
use super::group;

/// The largest journal that is read.
const MAX_BYTES: u64 = 16 << 20;

/// A journal is written anew when it has this many lines more than needed.
const SPARE_LINES: usize = 4096;

/// The same in bytes: a record of deploys can be long.
const SPARE_BYTES: usize = 1 << 20;

/// How long the lock may be held by a process that has not run its program yet.
pub(super) const LOCK_TIME: Duration = Duration::from_secs(5);

/// Pause between two attempts to get the lock.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// A process in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The name of its pool.
    pub pool: String,
    /// The place that it fills.
    pub place: u32,
    /// The number of its start.
    pub start: u32,
    /// The generation of its pool that it belongs to.
    pub generation: u32,
    /// The process id, once the child has written it.
    pub pid: Option<i32>,
    /// When the kernel started it, in clock ticks since the boot: with the id it identifies the
    /// process.
    pub started: Option<u64>,
    /// It gets no more connections.
    pub leaving: bool,
    /// Where it listens, in a steered pool.
    pub address: Option<SocketAddr>,
}

impl Record {
    /// The generation of a process that an older version has recorded.
    pub const UNKNOWN_GENERATION: u32 = 1;
}

/// The open journal. The lock is released when it is dropped and no child holds it.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    records: HashMap<Token, Record>,
    deploys: BTreeMap<String, Deploys>,
    lines: usize,
    /// Bytes written since the file was written anew.
    appended: usize,
    boot: String,
    /// The last write failed; the log was told.
    failed: bool,
}

impl Journal {
    /// Opens the journal at `path`, and waits up to `patience` for its lock. `None` if there is
    /// none and `create` is false. A journal that can be read and not written anew is used as it
    /// is.
    ///
    /// # Errors
    ///
    /// What the file system answers; that the file belongs to another user, or can be read by
    /// others; that another dispatcher holds the lock.
    pub fn open(path: &Path, create: bool, patience: Duration) -> io::Result<Option<Journal>> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(create).mode(0o600);
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let deadline = Instant::now() + patience;
        let (mut file, text) = loop {
            let file = match options.open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !create => {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            let about = file.metadata()?;
            let own = rustix::process::geteuid().as_raw();
            if !about.is_file() || about.uid() != own || about.mode() & 0o077 != 0 {
                return Err(io::Error::other(
                    "it must be a regular file of the dispatcher's user with mode 0600",
                ));
            }
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_RETRY);
                    continue;
                }
                Err(_) => return Err(io::Error::other("another dispatcher uses it")),
            }
            // The former owner may have replaced the file before it released the lock.
            if std::fs::metadata(path).is_ok_and(|now| now.ino() == about.ino()) {
                let mut bytes = Vec::new();
                (&file).take(MAX_BYTES).read_to_end(&mut bytes)?;
                break (file, String::from_utf8_lossy(&bytes).into_owned());
            }
        };
        let (records, deploys) = parse(&text, &boot);
        let new = text.is_empty();
        if new {
            writeln!(file, "{HEADER} {boot}")?;
        }
        let lines = text.lines().count();
        let mut journal = Journal {
            path: path.to_owned(),
            file,
            records,
            deploys,
            lines,
            appended: 0,
            boot,
            failed: false,
        };
        if !new && let Err(error) = journal.rewrite() {
            journal.report(&error);
        }
        Ok(Some(journal))
    }

    /// The processes that were recorded and have not ended, in the order of their starts.
    pub fn records(&self) -> Vec<(Token, &Record)> {
        let mut all: Vec<_> = self.records.iter().map(|(token, record)| (*token, record)).collect();
        all.sort_by_key(|(_, record)| (record.pool.as_str(), record.start));
        all
    }

    /// A process is about to be started.
    pub fn starts(&mut self, token: Token, record: Record) {
        let Record { pool, place, start, generation, address, .. } = &record;
        let mut line =
            format!("start {token} {place} {start} {pool}\ngeneration {token} {generation}\n");
        if let Some(address) = address {
            line.push_str(&format!("address {token} {address}\n"));
        }
        self.records.insert(token, record);
        self.append(&line);
    }

    /// The file, for the line that the child writes.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The process runs its program. Its id is in the journal already: the child wrote it.
    pub fn runs(&mut self, token: Token, pid: i32) {
        let started = group::stat(pid).map(|stat| stat.started);
        if let Some(record) = self.records.get_mut(&token) {
            record.pid = Some(pid);
            record.started = started;
            if let Some(started) = started {
                self.append(&format!("pid {token} {pid} {started}\n"));
            }
        }
    }

    /// The process gets no more connections.
    pub fn leaves(&mut self, token: Token) {
        if let Some(record) = self.records.get_mut(&token)
            && !std::mem::replace(&mut record.leaving, true)
        {
            self.append(&format!("leaving {token}\n"));
        }
    }

    /// The process gets connections again.
    pub fn stays(&mut self, token: Token) {
        if let Some(record) = self.records.get_mut(&token)
            && std::mem::take(&mut record.leaving)
        {
            self.append(&format!("stays {token}\n"));
        }
    }

    /// The process has ended.
    pub fn ended(&mut self, token: Token) {
        if self.records.remove(&token).is_some() {
            self.append(&format!("end {token}\n"));
            self.shorten();
        }
    }

    /// The deploys of a pool may have changed.
    pub fn records_deploys(&mut self, deploys: Deploys) {
        if self.deploys.get(&deploys.pool) == Some(&deploys) {
            return;
        }
        let line = deploys.line();
        self.deploys.insert(deploys.pool.clone(), deploys);
        self.append(&line);
        self.shorten();
    }

    /// The deploys of every pool, as last recorded.
    pub fn all_deploys(&self) -> Vec<Deploys> {
        self.deploys.values().cloned().collect()
    }

    /// Writes the file anew if most of its lines are not needed any more.
    fn shorten(&mut self) {
        if (self.lines > SPARE_LINES + 5 * self.records.len() || self.appended > SPARE_BYTES)
            && let Err(error) = self.rewrite()
        {
            self.report(&error);
        }
    }

    /// One line is one write, so a dispatcher that is killed leaves no half of a line. A full file
    /// system can leave one, and lines are missing then: the file is written anew.
    fn append(&mut self, line: &str) {
        self.lines += 1;
        self.appended += line.len();
        let written = match self.failed {
            true => self.rewrite(),
            false => self.file.write_all(line.as_bytes()),
        };
        match written {
            Ok(()) => self.failed = false,
            Err(error) => self.report(&error),
        }
    }

    fn report(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            log::error!(
                "event=process_journal_not_written path={} error={} \
                 hint=\"a later dispatcher will not know processes that are started now\"",
                crate::background::logger::value(&self.path.display()),
                crate::background::logger::quoted(error)
            );
        }
    }

    /// Replaces the file by one without the records of processes that have ended.
    fn rewrite(&mut self) -> io::Result<()> {
        let mut text = format!("{HEADER} {}\n", self.boot);
        for (token, record) in self.records() {
            let Record { pool, place, start, generation, pid, started, leaving, address } = record;
            text.push_str(&format!("start {token} {place} {start} {pool}\n"));
            text.push_str(&format!("generation {token} {generation}\n"));
            if let Some(address) = address {
                text.push_str(&format!("address {token} {address}\n"));
            }
            if let Some(pid) = pid {
                let started = started.map_or(String::new(), |started| format!(" {started}"));
                text.push_str(&format!("pid {token} {pid}{started}\n"));
            }
            if *leaving {
                text.push_str(&format!("leaving {token}\n"));
            }
        }
        for deploys in self.deploys.values() {
            if !self.records.values().any(|record| record.pool == deploys.pool) {
                continue;
            }
            text.push_str(&deploys.line());
        }
        let mut new = self.path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        // A dispatcher that was killed may have left it; only the holder of the lock comes here.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).append(true).create_new(true).mode(0o600);
        let mut file = options.open(&new)?;
        let replaced = flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .and_then(|()| file.write_all(text.as_bytes()))
            .and_then(|()| std::fs::rename(&new, &self.path));
        if let Err(error) = replaced {
            // It must not fill the file system further.
            let _ = std::fs::remove_file(&new);
            return Err(error);
        }
        self.file = file;
        self.lines = text.lines().count();
        self.appended = 0;
        Ok(())
    }
}

const HEADER: &str = "dispatcher-processes 1";

/// Reads the records; lines that cannot be understood are skipped.
fn parse(text: &str, boot: &str) -> (HashMap<Token, Record>, BTreeMap<String, Deploys>) {
    let (mut records, mut all) = (HashMap::new(), BTreeMap::new());
    let mut lines = text.lines();
    if lines.next() != Some(&format!("{HEADER} {boot}")) {
        return (records, all);
    }
    for line in lines {
        match line.strip_prefix("deploys ") {
            Some(json) => {
                if let Some(deploys) = Deploys::parse(json) {
                    all.insert(deploys.pool.clone(), deploys);
                }
            }
            None => _ = record(line, &mut records),
        }
    }
    (records, all)
}

fn record(line: &str, records: &mut HashMap<Token, Record>) -> Option<()> {
    let mut words = line.splitn(5, ' ');
    let kind = words.next()?;
    let token = Token::from_str(words.next()?).ok()?;
    match kind {
        "start" => {
            let place = words.next()?.parse().ok()?;
            let start = words.next()?.parse().ok()?;
            let pool = words.next()?.to_owned();
            let (pid, started) = (None, None);
            let generation = Record::UNKNOWN_GENERATION;
            let (leaving, address) = (false, None);
            let record = Record { pool, place, start, generation, pid, started, leaving, address };
            records.insert(token, record);
        }
        "pid" => {
            let pid = words.next()?.parse().ok()?;
            let record = records.get_mut(&token)?;
            record.pid = Some(pid);
            record.started = words.next().and_then(|started| started.parse().ok());
        }
        "generation" => records.get_mut(&token)?.generation = words.next()?.parse().ok()?,
        "address" => records.get_mut(&token)?.address = words.next()?.parse().ok(),
        "leaving" => records.get_mut(&token)?.leaving = true,
        "stays" => records.get_mut(&token)?.leaving = false,
        "end" => drop(records.remove(&token)),
        _ => {}
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: u8) -> Token {
        Token([number; 16])
    }

    fn web(place: u32, start: u32) -> Record {
        let pool = "web".to_owned();
        Record {
            pool,
            place,
            start,
            generation: 3,
            pid: None,
            started: None,
            leaving: false,
            // Processes of steered pools have one.
            address: (place % 2 == 1).then(|| SocketAddr::from(([127, 0, 0, 1], 20_000))),
        }
    }

    #[test]
    fn records_are_found_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        assert!(Journal::open(&path, false, LOCK_TIME).expect("no file").is_none());
        let mut journal = Journal::open(&path, true, LOCK_TIME).expect("made").expect("made");
        journal.starts(token(1), web(0, 1));
        let own = std::process::id() as i32;
        journal.runs(token(1), own);
        journal.starts(token(2), web(1, 2));
        journal.starts(token(3), web(2, 3));
        journal.runs(token(3), i32::MAX);
        journal.leaves(token(3));
        journal.leaves(token(2));
        journal.stays(token(2));
        journal.starts(token(4), web(3, 4));
        journal.ended(token(4));
        drop(journal);
        for _ in 0..2 {
            let journal = Journal::open(&path, false, LOCK_TIME).expect("read").expect("there");
            let found: Vec<_> =
                journal.records().into_iter().map(|(_, record)| record.clone()).collect();
            let started = group::stat(own).map(|stat| stat.started);
            assert!(started.is_some());
            let expected = [
                Record { pid: Some(own), started, ..web(0, 1) },
                web(1, 2),
                Record { leaving: true, ..web(2, 3) },
            ];
            assert_eq!(found, expected);
        }
        let mode = std::fs::metadata(&path).expect("there").mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn another_boot_and_garbage_are_ignored() {
        let boot = "0-1";
        let line = format!("start {} 0 1 web", token(1));
        assert_eq!(parse(&format!("{HEADER} {boot}\n{line}\n"), boot).0.len(), 1);
        assert_eq!(parse(&format!("{HEADER} 7\n{line}\n"), boot).0.len(), 0);
        assert_eq!(parse(&format!("{line}\n"), boot).0.len(), 0);
        for garbage in
            ["start", "start x 0 1 web", "pid 7", "end", "\0\0", "pid 0101 x", "start 01 y 1 w"]
        {
            assert_eq!(parse(&format!("{HEADER} {boot}\n{garbage}\n{line}\n"), boot).0.len(), 1);
        }
        // The last line of a file system that was full.
        let cut = &line[..20];
        assert_eq!(parse(&format!("{HEADER} {boot}\n{line}\n{cut}"), boot).0.len(), 1);
    }

    #[test]
    fn a_file_of_others_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        drop(Journal::open(&path, true, LOCK_TIME));
        let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&path, readable).expect("own file");
        assert!(Journal::open(&path, true, LOCK_TIME).is_err());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("a link");
        assert!(Journal::open(&link, true, LOCK_TIME).is_err());
    }

    #[test]
    fn the_journal_does_not_grow_without_bound() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        let mut journal = Journal::open(&path, true, LOCK_TIME).expect("made").expect("made");
        journal.starts(token(1), web(0, 1));
        for number in 0..20_000 {
            journal.starts(token(2), web(1, number));
            journal.ended(token(2));
        }
        let size = std::fs::metadata(&path).expect("there").len();
        assert!(size < 1 << 20, "{size}");
        assert_eq!(journal.records().len(), 1);
        drop(journal);
        let journal = Journal::open(&path, false, LOCK_TIME).expect("read").expect("there");
        assert_eq!(journal.records().len(), 1);
    }

    #[test]
    fn deploys_are_found_again_and_bounded() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        let mut journal = Journal::open(&path, true, LOCK_TIME).expect("made").expect("made");
        journal.starts(token(1), web(0, 1));
        let deploys = |pool: &str, current| Deploys {
            pool: pool.to_owned(),
            current,
            roll: None,
            versions: BTreeMap::new(),
        };
        for current in 0..40_000 {
            journal.records_deploys(deploys("web", current));
            journal.records_deploys(deploys("web", current));
        }
        journal.records_deploys(deploys("without a process", 7));
        let size = std::fs::metadata(&path).expect("there").len();
        assert!(size < 2 << 20, "{size}");
        drop(journal);
        let journal = Journal::open(&path, false, LOCK_TIME).expect("read").expect("there");
        assert_eq!(journal.records().len(), 1);
        let found = journal.all_deploys();
        assert!(found.contains(&deploys("web", 39_999)), "{found:?}");
    }

    #[test]
    fn a_second_dispatcher_does_not_get_the_lock() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        let _first = Journal::open(&path, true, LOCK_TIME).expect("made").expect("made");
        let second = Journal::open(&path, true, Duration::ZERO).expect_err("locked");
        assert!(second.to_string().contains("another dispatcher"), "{second}");
    }

    #[test]
    fn a_journal_that_cannot_be_written_anew_is_still_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("processes");
        let mut journal = Journal::open(&path, true, LOCK_TIME).expect("made").expect("made");
        journal.starts(token(1), web(0, 1));
        drop(journal);
        // As on a full file system, no new file can be written.
        let obstacle = folder.path().join("processes.new");
        std::fs::create_dir(&obstacle).expect("a directory");
        let mut journal = Journal::open(&path, false, LOCK_TIME).expect("read").expect("there");
        assert_eq!(journal.records(), [(token(1), &web(0, 1))]);
        // This line is not written: it could follow half of another one.
        journal.starts(token(2), web(1, 2));
        std::fs::remove_dir(&obstacle).expect("empty");
        journal.starts(token(3), web(2, 3));
        drop(journal);
        let journal = Journal::open(&path, false, LOCK_TIME).expect("read").expect("there");
        let starts: Vec<u32> = journal.records().iter().map(|(_, record)| record.start).collect();
        assert_eq!(starts, [1, 2, 3]);
    }
}
