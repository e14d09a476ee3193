//! `[pool.NAME.spawn]`: placeholders, accounts, permissions, limits, output.

use std::os::unix::fs::PermissionsExt;

use dispatcher_core::Supervision;

use super::*;

/// The valid file with these lines in `[pool.web.spawn]`.
fn spawning(lines: &str) -> String {
    format!("{GOOD}[pool.web.spawn]\ncommand = ['/bin/true']\n{lines}\n")
}

#[track_caller]
fn spawn_refused(lines: &str, message: &str, help: &str) {
    refused(&spawning(lines), message, help);
}

fn setup(lines: &str) -> ProcessSetup {
    good(&spawning(lines)).pools[0].spawn.as_ref().expect("processes").setup.clone()
}

fn is_root() -> bool {
    let root =
        nix::unistd::geteuid().is_root() && accounts::has(rustix::thread::CapabilitySet::SETUID);
    if !root {
        test_support::skip("needs root");
    }
    root
}

#[test]
fn placeholders() {
    let config = good(&spawning(
        "environment = { A = '{pool}-{n}', B = '{{{name}}}' }\ndirectory = '/{n}'\n",
    ));
    assert!(config.warnings[0].0.message.contains("there is no directory `/1`"));
    let place = Place { number: 2, name: "web-2", pool: "web", address: None, fd: None };
    let spawn = config.pools[0].spawn.as_ref().expect("processes");
    assert_eq!(expand(&spawn.environment[0].1, place), "web-2");
    assert_eq!(expand(&spawn.environment[1].1, place), "{web-2}");
    let command = |word: &str| format!("{GOOD}[pool.web.spawn]\ncommand = ['/bin/true', {word}]\n");
    refused(&command("'-p‹{nmae}›'"), "unknown placeholder `{nmae}`", "did you mean `{name}`?");
    refused(&command("'‹{number}›'"), "unknown placeholder `{number}`", "{n}, {name} and {pool}");
    refused(&command("'{{‹{N}›'"), "unknown placeholder `{N}`", "did you mean `{n}`?");
    refused(&command("'$‹{HOME}›/x'"), "unknown placeholder `{HOME}`", "`{{` and `}}` for braces");
    refused(&command("'a‹}›'"), "a single `}`", "`{{` and `}}`");
    refused(&command("'‹{›n'"), "a single `{`", "`{{` and `}}`");
    // The position counts what is written in the file.
    refused(&command("\"\\t\\u00e9 ‹{x}›\""), "unknown placeholder `{x}`", "");
    // The brace is not in the file, so the whole value is marked.
    refused(&command("‹\"\\u007bx}\"›"), "unknown placeholder `{x}`", "");
    spawn_refused("environment = { A = 'a‹{nam}›' }", "unknown placeholder", "`{name}`?");
    spawn_refused("directory = '/srv/‹{pol}›'", "unknown placeholder", "`{pool}`?");
}

#[test]
fn the_name_of_a_program_and_a_directory_may_vary() {
    let here = tempfile::tempdir().expect("a directory");
    let at = here.path().display();
    for name in ["web-1", "web-2"] {
        std::fs::create_dir(here.path().join(name)).expect("a directory");
        std::os::unix::fs::symlink("/bin/true", here.path().join(name).join("run"))
            .expect("a link");
    }
    let text = |count: u32| {
        format!(
            "{GOOD}[pool.web.spawn]\ncommand = ['./run']\ndirectory = '{at}/{{name}}'\nprocesses = {count}\n"
        )
    };
    assert_eq!(good(&text(2)).warnings, []);
    let warnings = good(&text(3)).warnings;
    let expected = format!("there is no directory `{at}/web-3`");
    assert_eq!(warnings[0].0.message, expected);
}

#[test]
fn forked_processes_have_one_command() {
    let forks = |text: &str| good(text).pools[0].spawn.as_ref().expect("processes").fork;
    assert!(!forks(&spawning("")));
    let own = "environment = { A = '{name}{n}' }\ndirectory = '/tmp/{{n}}'";
    assert!(forks(&spawning(&format!("fork = true\n{own}"))));
    assert!(forks(&format!("[defaults.spawn]\nfork = true\n{}", spawning(""))));
    assert!(!forks(&format!("[defaults.spawn]\nfork = true\n{}", spawning("fork = false"))));
    let command = |word: &str| {
        format!("{GOOD}[pool.web.spawn]\nfork = true\ncommand = ['/bin/true', {word}]\n")
    };
    assert!(forks(&command("'--pool={pool}'")));
    let message = "`{n}` and `{name}` have no value here with `fork = true`";
    refused(&command("‹'--port=80{n}'›"), message, "`fork = false`");
    spawn_refused("fork = true\ndirectory = ‹'/srv/{name}'›", message, "in `environment`");
    spawn_refused("fork = ‹1›", "expected a boolean", "");
    let long = "x".repeat(30_000);
    let text = |fork| {
        format!(
            "environment = {{ A = '{{n}}{long}', B = '{{n}}{long}', C = '{{n}}{long}' }}\nfork = {fork}"
        )
    };
    good(&spawning(&text(false)));
    let error = Config::parse(&spawning(&text(true)), "test.toml").expect_err("too long");
    assert!(error.to_string().contains("too long for `fork = true`"), "{error}");
}

#[test]
fn the_demo_has_no_placeholders() {
    let command = vec!["/opt/{name}/run".to_owned()];
    let listen = ([127, 0, 0, 1], 0).into();
    let config = Config::demo(listen, 1, "/a".into(), "/d".into(), "/r".into(), command);
    let spawn = config.pools[0].spawn.as_ref().expect("processes");
    let place = Place { number: 1, name: "web-1", pool: "web", address: None, fd: None };
    assert_eq!(expand(&spawn.command[0], place), "/opt/{name}/run");
}

#[test]
fn masks() {
    assert_eq!(setup("umask = '0027'").umask, Some(0o027));
    assert_eq!(setup("umask = 0o77").umask, Some(0o077));
    assert_eq!(setup("").umask, None);
    spawn_refused("umask = ‹27›", "must be written in octal", "\"0027\" (text), or 0o27");
    spawn_refused("umask = ‹'0999'›", "must be written in octal", "\"0027\"");
    spawn_refused("umask = ‹'1777'›", "from \"0000\" to \"0777\"", "no permission for others");
    spawn_refused("umask = ‹true›", "expected permission bits that new files do not get", "0027");
}

#[test]
fn limits_have_units_and_a_soft_and_a_hard_part() {
    let both = |value| Some(Limit { soft: value, hard: value });
    let limits = |lines: &str| setup(&format!("limits = {{ {lines} }}")).limits;
    assert_eq!(limits("nofile = 100").open_files, both(100));
    assert_eq!(limits("nofile = '64:128'").open_files, Some(Limit { soft: 64, hard: 128 }));
    assert_eq!(limits("core = 0").core, both(0));
    assert_eq!(limits("core = 0").memory, None);
    for (text, bytes) in
        [("4096KiB", 4 << 20), ("8 MiB", 8 << 20), ("1G", 1 << 30), ("2097152", 2 << 20)]
    {
        assert_eq!(limits(&format!("memory = '{text}'")).memory, both(bytes), "{text}");
    }
    let table = setup("[pool.web.spawn.limits]\ncore = '0:1MiB'");
    assert_eq!(table.limits.core, Some(Limit { soft: 0, hard: 1 << 20 }));
    assert_eq!(table.limits.core.expect("set").to_string(), "0:1048576");
    assert_eq!(Limit { soft: 0, hard: UNLIMITED }.to_string(), "0:unlimited");

    let refused = |line: &str, message: &str, help: &str| {
        spawn_refused(&format!("limits = {{ {line} }}"), message, help);
    };
    refused("‹nofiles› = 4", "unknown key `nofiles`", "did you mean `nofile`?");
    refused("nofile = ‹'many'›", "`many` is not a limit", "\"1024:4096\"");
    refused("nofile = ‹'1k'›", "`1k` is not a limit", "4096");
    refused("nofile = ‹'unlimited'›", "`unlimited` is not a limit", "4096");
    refused("nofile = ‹-1›", "`-1` is not a limit", "4096");
    refused("nofile = ‹'9:4'›", "the soft limit is above the hard limit", "first");
    refused("nofile = ‹3›", "too low for a program to start", "the least is 16");
    refused("nofile = ‹99999999999999›", "the kernel allows", "fs.nr_open");
    refused("memory = ‹'1GB'›", "`1GB` is not a limit", "\"512MiB\"");
    refused("memory = ‹'-1GiB'›", "is not a limit", "\"512MiB\"");
    refused("memory = ‹'99999999999TiB'›", "is not a limit", "");
    refused("memory = ‹4096›", "too low for a program to start", "the least is 1MiB");
    refused("core = ‹true›", "expected bytes, such as 0", "core = 0");
    spawn_refused("[pool.web.spawn.limits]\nmemory = ‹'x'›", "`x` is not a limit", "");
    spawn_refused("‹cwd› = '/'", "unknown key `cwd`", "did you mean `directory`?");
    pool_refused("‹nofile› = 4", "unknown key", "belongs in [pool.NAME.spawn.limits]");
}

#[test]
fn a_limit_above_the_own_hard_limit_needs_a_permission() {
    use nix::sys::resource::{Resource, getrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    let nr_open = std::fs::read_to_string("/proc/sys/fs/nr_open").expect("a number");
    let most: u64 = nr_open.trim().parse().expect("a number");
    let above = hard.max(most) + 1;
    let line = format!("limits = {{ nofile = ‹{above}› }}");
    spawn_refused(&line, &format!("the kernel allows {most} open files"), "fs.nr_open");
    if hard >= most {
        return;
    }
    let above = hard + 1;
    if accounts::has(rustix::thread::CapabilitySet::SYS_RESOURCE) {
        let limits = setup(&format!("limits = {{ nofile = {above} }}")).limits;
        assert_eq!(limits.open_files, Some(Limit { soft: above, hard: above }));
    } else {
        spawn_refused(
            &format!("limits = {{ nofile = ‹{above}› }}"),
            &format!("above the dispatcher's own hard limit, {hard}"),
            "LimitNOFILE= of its unit",
        );
    }
    let good = setup(&format!("limits = {{ nofile = '64:{hard}' }}")).limits;
    assert_eq!(good.open_files, Some(Limit { soft: 64, hard }));
}

#[test]
fn limits_have_their_defaults_one_by_one() {
    let config = good(&format!(
        "[defaults.spawn]\numask = '0077'\noutput = 'log'\noutput_rate = 5\n\
         limits = {{ core = 0, nofile = 99 }}\n{}",
        spawning("limits = { nofile = 98 }")
    ));
    let setup = &config.pools[0].spawn.as_ref().expect("processes").setup;
    assert_eq!(setup.limits.core, Some(Limit { soft: 0, hard: 0 }));
    assert_eq!(setup.limits.open_files, Some(Limit { soft: 98, hard: 98 }));
    assert_eq!((setup.umask, setup.output, setup.output_rate), (Some(0o077), Output::Log, 5));
}

#[test]
fn the_output_goes_one_of_two_ways() {
    assert_eq!(setup("").output, Output::Inherit);
    assert_eq!(setup("output = 'log'").output, Output::Log);
    spawn_refused("output = ‹'logs'›", "unknown value `logs`", "did you mean `log`?");
    spawn_refused("output_rate = ‹0›", "from 1 to 1000000", "");
    let warnings = good(&spawning("output_rate = 9")).warnings;
    assert!(warnings[0].0.message.contains("no effect without output = \"log\""), "{warnings:?}");
    assert_eq!(good(&spawning("output = 'log'\noutput_rate = 9")).warnings, []);
}

fn rolls(lines: &str) -> (ReadyCheck, Supervision) {
    let pool = good(&spawning(lines)).pools.remove(0);
    (pool.spawn.expect("processes").ready_check, pool.settings.supervision)
}

#[test]
fn a_ready_check_is_nothing_a_take_or_a_request() {
    let (check, supervision) = rolls("");
    assert_eq!((check, supervision.ready_check), (ReadyCheck::Tcp, true));
    assert_eq!(rolls("ready_check = 'tcp'").0, ReadyCheck::Tcp);
    let (check, supervision) = rolls("ready_check = 'none'");
    assert_eq!((check, supervision.ready_check), (ReadyCheck::None, false));
    for path in ["/", "/health", "/a/b?deep=1&x=%20"] {
        let (check, supervision) = rolls(&format!("ready_check = '{path}'"));
        assert_eq!((check, supervision.ready_check), (ReadyCheck::Http(path.to_owned()), true));
    }
    let example =
        "the path of an HTTP request that is answered with 200 to 399, such as \"/health\"";
    for wrong in ["http", "", "health", "http://localhost/health", "/a b", "TCP", " tcp"] {
        let message = format!("`{wrong}` is no ready check");
        spawn_refused(&format!("ready_check = ‹'{wrong}'›"), &message, example);
    }
    let longest = format!("/{}", "a".repeat(1023));
    assert_eq!(rolls(&format!("ready_check = '{longest}'")).0, ReadyCheck::Http(longest.clone()));
    spawn_refused(&format!("ready_check = ‹'{longest}a'›"), "is no ready check", example);
    spawn_refused("ready_check = ‹true›", "expected a string", "ready_check = \"tcp\"");
    spawn_refused("ready_check = ‹['/health']›", "expected a string", "ready_check = \"tcp\"");
    pool_refused("‹ready_check› = 'tcp'", "unknown key", "belongs in [pool.NAME.spawn]");
}

#[test]
fn keys_of_rolls_have_bounds_and_defaults() {
    let seconds = Duration::from_secs;
    let default = rolls("").1;
    assert_eq!(default.ready_timeout, seconds(30));
    assert_eq!((default.min_ready, default.max_leaving_generations), (Duration::ZERO, 2));
    assert!(!default.undo_on_failure && default.prefer_new);

    let set = rolls(
        "ready_timeout = '2m'\nmin_ready = '10s'\nmax_leaving_generations = 0\non_failure = 'undo'",
    );
    assert_eq!((set.1.ready_timeout, set.1.min_ready), (seconds(120), seconds(10)));
    assert_eq!((set.1.max_leaving_generations, set.1.undo_on_failure), (0, true));
    assert!(!rolls("on_failure = 'stop'").1.undo_on_failure);

    spawn_refused("ready_timeout = ‹'0s'›", "must be at least \"1ms\"", "");
    spawn_refused("min_ready = ‹10›", "expected a duration", "such as");
    spawn_refused("min_ready = ‹'2years'›", "must be at most", "");
    spawn_refused("max_leaving_generations = ‹1025›", "from 0 to 1024", "");
    spawn_refused("max_leaving_generations = ‹-1›", "", "max_leaving_generations = 2");
    spawn_refused("on_failure = ‹'rollback'›", "unknown value `rollback`", "stop, undo");
    spawn_refused("on_failure = ‹'undoo'›", "unknown value `undoo`", "did you mean `undo`?");
    spawn_refused("‹min_redy› = '1s'", "unknown key `min_redy`", "did you mean `min_ready`?");
}

#[test]
fn keys_of_rolls_have_defaults_of_all_pools() {
    let defaults =
        "[defaults.spawn]\nready_check = '/health'\nmin_ready = '3s'\non_failure = 'undo'\n";
    let of = |lines: &str| {
        let pool = good(&format!("{defaults}{}", spawning(lines))).pools.remove(0);
        (pool.spawn.expect("processes").ready_check, pool.settings.supervision)
    };
    let (check, supervision) = of("");
    assert_eq!(check, ReadyCheck::Http("/health".to_owned()));
    assert_eq!(
        (supervision.min_ready, supervision.undo_on_failure),
        (Duration::from_secs(3), true)
    );
    let (check, supervision) = of("ready_check = 'none'\nmin_ready = '0s'\non_failure = 'stop'");
    assert_eq!((check, supervision.ready_check), (ReadyCheck::None, false));
    assert_eq!((supervision.min_ready, supervision.undo_on_failure), (Duration::ZERO, false));
    // A mistake there is shown there.
    let text = format!("[defaults.spawn]\nready_check = ‹'x'›\n{}", spawning(""));
    refused(&text, "`x` is no ready check", "\"none\", \"tcp\"");
}

#[test]
fn a_restart_is_needed_for_what_processes_are_started_from() {
    let spawn = |lines: &str| good(&spawning(lines)).pools.remove(0).spawn.expect("processes");
    let before = spawn("processes = 2");
    for same in ["processes = 4", "ready_check = '/'", "min_ready = '9s'", "on_failure = 'undo'"] {
        assert!(spawn(&format!("{same}\n")).starts_like(&before), "{same}");
    }
    for other in ["environment = { A = '1' }", "umask = '0077'", "output = 'log'", "fork = true"] {
        assert!(!spawn(other).starts_like(&before), "{other}");
    }
}

#[test]
fn names_of_other_programs_lead_to_keys_of_rolls() {
    for (theirs, ours) in [
        ("minReadySeconds", "min_ready"),
        ("readinessProbe", "ready_check"),
        ("readiness_probe", "ready_check"),
        ("healthcheck", "ready_check"),
        ("maxSurge", "max_surge"),
        ("progressDeadlineSeconds", "ready_timeout"),
        ("terminationGracePeriodSeconds", "stop_timeout"),
        ("failure_action", "on_failure"),
        ("worker_boot_timeout", "start_timeout"),
        ("worker_shutdown_timeout", "drain_timeout"),
        ("ExecStart", "command"),
        ("TimeoutStartSec", "start_timeout"),
        ("TimeoutStopSec", "stop_timeout"),
    ] {
        let message = format!("unknown key `{theirs}`");
        spawn_refused(&format!("‹{theirs}› = 1"), &message, &format!("did you mean `{ours}`?"));
    }
}

#[test]
fn an_unknown_account_is_a_mistake() {
    spawn_refused("user = ‹'nobody-here'›", "unknown user `nobody-here`", "getent passwd");
    spawn_refused("group = ‹'nobody-here'›", "unknown group `nobody-here`", "getent group");
    spawn_refused("user = ‹-1›", "-1 is not a user id", "");
    spawn_refused("group = ‹4294967295›", "4294967295 is not a group id", "");
    spawn_refused("user = ‹1.5›", "expected a name or a numeric id", "such as: user = ");
    spawn_refused("user = ‹3999999999›", "user 3999999999 has no account", "add `group`");
}

#[test]
fn the_own_account_needs_no_permission() {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let account = setup(&format!("user = {uid}\ngroup = {gid}")).account.expect("an account");
    assert_eq!((account.uid, account.gid), (uid, gid));
}

#[test]
fn an_account_has_its_groups_and_variables() {
    if !is_root() {
        return;
    }
    let account = setup("user = 'daemon'").account.expect("an account");
    let daemon = nix::unistd::User::from_name("daemon").expect("readable").expect("an account");
    assert_eq!((account.uid, account.gid), (daemon.uid.as_raw(), daemon.gid.as_raw()));
    assert!(account.groups.expect("a list").contains(&account.gid));
    assert_eq!(account.user_text, format!("{} (daemon)", account.uid));
    assert!(account.variables.contains(&("USER".to_owned(), Some("daemon".to_owned()))));
    // A number that has an account is the same.
    let same = setup(&format!("user = {}", daemon.uid)).account.expect("an account");
    assert_eq!(same.variables, account.variables);
    // Another group comes in addition.
    let other = setup("user = 'daemon'\ngroup = 65534").account.expect("an account");
    assert_eq!(other.gid, 65_534);
    assert!(other.groups.expect("a list").contains(&65_534));
    // A number without an account has its group only, and not the variables of root.
    let number = setup("user = 3999999999\ngroup = 3999999998").account.expect("an account");
    assert_eq!(number.groups, Some(vec![3_999_999_998]));
    assert!(number.variables.contains(&("HOME".to_owned(), None)));
    // The group alone: the user stays.
    let group = setup("group = 65534").account.expect("an account");
    assert_eq!((group.uid, group.gid), (0, 65_534));
    assert_eq!(group.variables, []);
}

#[test]
fn check_warns_about_what_the_user_cannot_reach() {
    if !is_root() {
        return;
    }
    let here = tempfile::tempdir().expect("a directory");
    let mode = |mode| {
        std::fs::set_permissions(here.path(), PermissionsExt::from_mode(mode)).expect("own");
    };
    let at = here.path().display();
    let program = here.path().join("program");
    std::fs::copy("/bin/true", &program).expect("a copy");
    let text = |lines: &str| {
        format!(
            "dispatch_socket = '{at}/d.sock'\n{lines}\n{GOOD}[pool.web.spawn]\n\
             command = ['{at}/program']\ndirectory = '{at}'\nuser = 65534\ngroup = 65534\n"
        )
    };
    let warnings = |lines: &str| -> Vec<String> {
        good(&text(lines)).warnings.iter().map(ToString::to_string).collect()
    };
    mode(0o755);
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("own");
    assert_eq!(warnings(""), [""; 0]);
    let found = warnings("dispatch_socket_mode = '0660'");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("cannot connect to the dispatch socket: its mode is 0660"));
    assert!(found[0].contains("help: the processes cannot join: set `dispatch_socket_mode`"));
    let group = "dispatch_socket_mode = '0660'\ndispatch_socket_group = 65534";
    assert_eq!(warnings(group), [""; 0], "the group may connect");
    let owner = "dispatch_socket_mode = '0600'\ndispatch_socket_user = 65534";
    assert_eq!(warnings(owner), [""; 0], "the owner may connect");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).expect("own");
    let found = warnings("");
    assert!(found[0].contains("cannot execute"), "{found:?}");
    mode(0o700);
    let found = warnings("");
    for part in ["cannot reach the dispatch socket", "cannot execute", "cannot enter"] {
        assert!(found.iter().any(|warning| warning.contains(part)), "{part}: {found:?}");
    }
    assert!(found.iter().any(|warning| warning.contains(&format!("chmod o+x {at}"))), "{found:?}");
}
