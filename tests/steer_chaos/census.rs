//! Quiet points: what the dispatcher and the kernel's maps say is compared with the kernel's list
//! of sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use aya::maps::{HashMap, Map, MapData};
use dispatcher::api::status::{PoolStatus, Status, WorkerStatus};
use simulator::Random;
use test_support::{Process, assert_conserved};

use super::client::{Clients, Refusal, Target};
use super::place::{MEMBERS, PUBLICS, Run, SHARED, SPAWNED, output};

/// Connections that are held at each public address.
const HELD: usize = 20;

/// Handshakes that a pool remembers at most.
const MOST_HANDSHAKES: usize = 65_536;

/// What one dispatcher uses.
#[derive(Clone, Debug, Default)]
pub struct Use {
    /// Its descriptors by kind.
    pub fds: BTreeMap<String, usize>,
    /// In KiB.
    pub memory: u64,
}

/// What a quiet point has found.
#[derive(Clone, Debug, Default)]
pub struct Quiet {
    pub used: Use,
    /// Connections compared.
    pub compared: usize,
    /// Handshakes that the maps remember.
    pub remembered: usize,
}

/// No client is connected, and none begins.
pub fn hush(clients: &Clients, tend: &mut dyn FnMut()) -> Result<(), String> {
    clients.paused.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(100);
    // A client counts as busy for a moment before it sees that it is to pause.
    let mut idle = 0;
    while idle < 10 {
        idle = if clients.busy.load(Ordering::SeqCst) == 0 { idle + 1 } else { 0 };
        if Instant::now() > deadline {
            let busy = clients.busy.load(Ordering::SeqCst);
            return Err(format!("{busy} clients still wait for something"));
        }
        tend();
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Compares everything while connections are held, and again when there are none.
pub fn compare(run: &Run, dispatcher: &Process, random: &mut Random) -> Result<Quiet, String> {
    run.wait_status("what vanished to be forgotten", |status| loads_are(status, 0))?;
    let mut held: Vec<TcpStream> = Vec::new();
    for (address, _) in PUBLICS {
        for _ in 0..HELD {
            let target = Target { address, refusal: Refusal::Told };
            held.push(run.clients.hold(target, random)?);
        }
    }
    let compared = held.len();
    run.wait_status("the counts with connections to equal the kernel's", |status| {
        let sum = loads(status).sum::<u64>();
        if sum != compared as u64 {
            return Err(format!("{sum} connections count, {compared} are held"));
        }
        equal(status)
    })?;
    for client in &held[..compared / 2] {
        rustix::net::sockopt::set_socket_linger(client, Some(Duration::ZERO)).unwrap();
    }
    drop(held);
    run.wait_status("the counts without connections to equal the kernel's", |status| {
        loads_are(status, 0)?;
        equal(status)
    })?;
    for (address, _) in PUBLICS {
        (0..HELD).for_each(|_| run.clients.must_be_served_at(address, random));
    }
    run.wait_status("the loads to be zero", |status| loads_are(status, 0))?;
    let remembered = maps(run)?;
    let expected = run.wait_status("no process to be left over", |status| {
        let mut expected: BTreeSet<i32> =
            status.pools.iter().flat_map(|pool| &pool.workers).map(|worker| worker.pid).collect();
        expected.insert(dispatcher.pid());
        expected.remove(&0);
        let found = run.processes("dispatcher");
        if found == expected { Ok(()) } else { Err(format!("{found:?} run, not {expected:?}")) }
    });
    expected?;
    // A suspect has a connection of the dispatcher until it accepts it.
    run.wait_status("every worker to be trusted", everything_is_there)?;
    // Requests of the status come and go.
    let all = std::iter::repeat_with(|| {
        std::thread::sleep(Duration::from_millis(5));
        used(dispatcher)
    });
    let used = all.take(40).min_by_key(|used| used.fds.values().sum::<usize>());
    Ok(Quiet { used: used.unwrap_or_default(), compared, remembered })
}

pub fn everything_is_there(status: &Status) -> Result<(), String> {
    assert_conserved(status);
    let wanted = SPAWNED.iter().copied().chain([("units", MEMBERS.len())]);
    for (name, count) in wanted {
        let pool = status.pools.iter().find(|pool| pool.name == name).ok_or(name)?;
        let active = pool.workers.iter().filter(|worker| worker.state == "active").count();
        if active != count || pool.workers.len() != count {
            return Err(format!("{active} of {} workers of {name}", pool.workers.len()));
        }
        let steer = pool.steer.as_ref().ok_or("it does not steer")?;
        if !steer.pinned || steer.error.is_some() || !steer.not_steered.is_empty() {
            return Err(format!("{steer:?}"));
        }
        if let Some(processes) = &pool.processes
            && (processes.active as usize, processes.starting, processes.leaving) != (count, 0, 0)
        {
            return Err(format!("{processes:?}"));
        }
    }
    Ok(())
}

fn loads(status: &Status) -> impl Iterator<Item = u64> {
    status.pools.iter().flat_map(|pool| &pool.workers).map(|worker| worker.load)
}

fn loads_are(status: &Status, wanted: u64) -> Result<(), String> {
    let all: Vec<u64> = loads(status).collect();
    if all.iter().all(|&load| load == wanted) { Ok(()) } else { Err(format!("loads {all:?}")) }
}

/// Worker by worker: connections of its process, and those in its accept queue.
fn equal(status: &Status) -> Result<(), String> {
    assert_conserved(status);
    let mut of_process: BTreeMap<i32, u64> = BTreeMap::new();
    let lines = output(&["ss", "-tnpH", "state", "established", "state", "close-wait"]);
    for line in lines.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        // With two states the first column says which.
        let local = words.iter().filter_map(|word| port(word)).next().unwrap_or(0);
        if PUBLICS.iter().any(|(address, _)| address.port() == local) {
            *of_process.entry(pid(line)).or_default() += 1;
        }
    }
    // By port: the process, and how many wait.
    let mut listeners: BTreeMap<u16, (i32, u64)> = BTreeMap::new();
    // By process: how many wait in the listeners that it inherited, which the dispatcher has, too.
    let mut inherited: BTreeMap<i32, u64> = BTreeMap::new();
    for line in output(&["ss", "-tlnpH"]).lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let (Some(queued), Some(port)) = (words[1].parse().ok(), port(words[3])) {
            listeners.insert(port, (pid(line), queued));
            pids(line).for_each(|pid| *inherited.entry(pid).or_default() += queued);
        }
    }
    let of_pool = |pool: &'_ PoolStatus| {
        let shared = pool.name == SHARED;
        pool.workers.iter().map(move |worker| (worker.clone(), shared)).collect::<Vec<_>>()
    };
    let workers = status.pools.iter().flat_map(of_pool);
    let mut waiting = 0;
    for (worker, shared) in workers {
        let (live, pending, port) = counts(&worker);
        let (pid, mut queued) = match shared {
            true => (worker.pid, inherited.get(&worker.pid).copied().unwrap_or(0)),
            false => listeners.get(&port).copied().unwrap_or((worker.pid, 0)),
        };
        waiting += queued;
        // The dispatcher's own connection waits until a suspect accepts; it is no load.
        if shared && worker.state == "suspect" {
            queued = queued.saturating_sub(1);
        }
        let accepted = of_process.remove(&pid).unwrap_or(0);
        if live != accepted + queued || pending != 0 {
            return Err(format!(
                "{} counts {live} and {pending} pending; process {pid} at {port} has {accepted}, \
                 and {queued} wait",
                worker.name
            ));
        }
    }
    // Those that wait have no process.
    if of_process.remove(&0).unwrap_or(0) != waiting || !of_process.is_empty() {
        return Err(format!("{waiting} wait; others have connections: {of_process:?}"));
    }
    Ok(())
}

fn counts(worker: &WorkerStatus) -> (u64, u64, u16) {
    let Some(steer) = &worker.steer else { return (0, 0, 0) };
    (steer.live, steer.pending, port(&steer.address).unwrap_or(0))
}

fn port(address: &str) -> Option<u16> {
    address.rsplit_once(':')?.1.parse().ok()
}

fn pid(line: &str) -> i32 {
    pids(line).next().unwrap_or(0)
}

fn pids(line: &str) -> impl Iterator<Item = i32> {
    line.split("pid=").skip(1).filter_map(|rest| rest.split(',').next()?.parse().ok())
}

/// Entries of the pinned maps: only those of workers and public addresses that exist. The number of
/// handshakes that are remembered.
fn maps(run: &Run) -> Result<usize, String> {
    let mut remembered = 0;
    let pools: Vec<_> = below(&run.pins).iter().flat_map(|path| below(path)).collect();
    if pools.len() != SPAWNED.len() + 1 {
        return Err(format!("pins of {} pools, not: {pools:?}", SPAWNED.len() + 1));
    }
    let mut ports = BTreeSet::new();
    let (mut publics, mut shared) = (0, Vec::new());
    for pins in pools.iter().flat_map(|path| below(path)) {
        for key in keys::<20>(&pins.join("members"))? {
            // An address, and a port in the order of this machine.
            ports.insert(u32::from_ne_bytes([key[16], key[17], key[18], key[19]]));
        }
        publics += keys::<20>(&pins.join("publics"))?.len();
        let handshakes = keys::<20>(&pins.join("remotes"))?.len();
        if handshakes > MOST_HANDSHAKES {
            return Err(format!("{handshakes} handshakes are remembered"));
        }
        remembered += handshakes;
        if pins.join("listener_workers").exists() {
            let count = |name| keys::<8>(&pins.join(name)).map(|all| all.len());
            shared.push((count("listener_workers")?, count("moved")?));
        }
    }
    // One pool has them: each of its processes has a listener at each of its addresses.
    let of_shared = |list: &[(&str, usize)]| list.iter().find(|it| it.0 == SHARED).map(|it| it.1);
    let addresses = PUBLICS.iter().filter(|(_, pool)| *pool == SHARED).count();
    let listeners = of_shared(&SPAWNED).unwrap_or(0) * addresses;
    if shared != [(listeners, 0)] {
        return Err(format!("{shared:?} listeners and moved connections, not {listeners} and 0"));
    }
    let mut expected = BTreeSet::new();
    let status = run.status().ok_or("no status")?;
    let own = status.pools.iter().filter(|pool| pool.name != SHARED);
    for worker in own.flat_map(|pool| &pool.workers) {
        expected.insert(u32::from(counts(worker).2));
    }
    if ports != expected || publics != PUBLICS.len() {
        let found = format!("ports {ports:?} and {publics} public addresses");
        return Err(format!("the maps have {found}; the workers have {expected:?}"));
    }
    Ok(remembered)
}

fn keys<const SIZE: usize>(pin: &Path) -> Result<Vec<[u8; SIZE]>, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", pin.display());
    let data = MapData::from_pin(pin).map_err(|error| failed(&error))?;
    let map = Map::from_map_data(data).map_err(|error| failed(&error))?;
    let value = match &map {
        Map::LruHashMap(data) | Map::HashMap(data) => data.info().map(|info| info.value_size()),
        _ => return Err(failed(&"no hash map")),
    };
    match value.map_err(|error| failed(&error))? {
        4 => all(HashMap::<_, [u8; SIZE], u32>::try_from(&map), &failed),
        _ => all(HashMap::<_, [u8; SIZE], [u8; 16]>::try_from(&map), &failed),
    }
}

fn all<const SIZE: usize, V: aya::Pod>(
    map: Result<HashMap<&MapData, [u8; SIZE], V>, aya::maps::MapError>,
    failed: &dyn Fn(&dyn std::fmt::Display) -> String,
) -> Result<Vec<[u8; SIZE]>, String> {
    let map = map.map_err(|error| failed(&error))?;
    map.keys().collect::<Result<_, _>>().map_err(|error| failed(&error))
}

fn below(path: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn used(dispatcher: &Process) -> Use {
    let mut fds = BTreeMap::new();
    let entries = std::fs::read_dir(format!("/proc/{}/fd", dispatcher.pid())).unwrap();
    for target in entries.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()) {
        let text = target.to_string_lossy();
        let kind = text.split(['[', ':']).next().unwrap_or_default().to_owned();
        // The journal of processes that serve on is open once there was one.
        if text.contains(".processes") {
            continue;
        }
        let kind = if kind == "anon_inode" { text.into_owned() } else { kind };
        *fds.entry(kind).or_default() += 1;
    }
    Use { fds, memory: dispatcher.memory() }
}
