//! The memory that a process uses.

/// The proportional set size of a process in bytes: its own pages, and its share of the pages that
/// it shares with others. Where the kernel does not tell that, the resident set size. `None` if the
/// process has ended.
pub(super) fn of(pid: i32) -> Option<u64> {
    proportional(pid).or_else(|| resident(pid))
}

fn proportional(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes.saturating_mul(1024))
}

fn resident(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages.saturating_mul(rustix::param::page_size() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_memory_counts() {
        let pid = std::process::id() as i32;
        let block = std::hint::black_box(vec![7u8; 64 << 20]);
        assert!(of(pid).expect("it runs") >= 64 << 20);
        assert!(resident(pid).expect("it runs") > 32 << 20);
        drop(block);
        let mut small = std::process::Command::new("sleep").arg("60").spawn().expect("it starts");
        let used = of(small.id() as i32);
        small.kill().expect("it runs");
        small.wait().expect("it ended");
        assert!(used.is_some_and(|used| used < 32 << 20), "{used:?}");
        assert_eq!(of(i32::MAX), None);
    }
}
