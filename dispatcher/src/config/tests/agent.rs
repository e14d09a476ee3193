//! Keys about HAProxy's agent check.

use super::*;

fn with(lines: &str) -> Config {
    good(&format!("{GOOD}{lines}\n"))
}

#[test]
fn an_agent_has_an_address_and_a_whole() {
    let pool = &good(GOOD).pools[0];
    assert_eq!((pool.agent_listen.clone(), pool.settings.agent_workers), (None, None));
    let config = with("agent_listen = '[::1]:9902'\nagent_workers = 8");
    assert_eq!(config.warnings, []);
    assert_eq!(
        config.pools[0].agent_listen.as_ref().map(ToString::to_string).unwrap(),
        "[::1]:9902"
    );
    assert_eq!(config.pools[0].settings.agent_workers, Some(8));
    let config = with("agent_listen = 'systemd:agent'");
    assert_eq!(config.pools[0].agent_listen, Some(Address::Systemd("agent".to_owned())));
    // Several pools may let the kernel choose.
    let two = "agent_listen = '127.0.0.1:0'\n[pool.chat]\nagent_listen = '127.0.0.1:0'";
    assert_eq!(with(two).pools.len(), 2);
    // A default for the whole is not useless for a pool without an agent.
    assert_eq!(good(&format!("[defaults]\nagent_workers = 4\n{GOOD}")).warnings, []);
}

#[test]
fn mistakes() {
    pool_refused(
        "agent_listen = ‹'unix:/run/agent'›",
        "HAProxy's agent check cannot use a Unix socket",
        "\"10.0.0.1:9902\"",
    );
    pool_refused("agent_listen = ‹'127.0.0.1'›", "is not an address", "add a port");
    pool_refused("agent_listen = ‹'localhost:9902'›", "is not an address", "not resolved");
    pool_refused("agent_workers = ‹0›", "", "");
    refused(
        &format!("[defaults]\nagent_listen = ‹'127.0.0.1:9902'›\n{GOOD}"),
        "pools cannot share `agent_listen`",
        "write it in each [pool.NAME]",
    );
    pool_refused("‹agent_lisen› = 'x'", "unknown key", "did you mean `agent_listen`?");
}

#[test]
fn an_address_belongs_to_one_socket() {
    let other = "use a different port";
    for address in ["127.0.0.1:8080", "0.0.0.0:8080", "[::]:8080", "[::ffff:127.0.0.1]:8080"] {
        pool_refused(
            &format!("agent_listen = ‹'{address}'›"),
            "listener `web` has this address already",
            other,
        );
    }
    for key in ["admin_http", "advice_listen"] {
        refused(
            &format!("{key} = '127.0.0.1:9902'\n{GOOD}agent_listen = ‹'127.0.0.1:9902'›\n"),
            &format!("`{key}` has this address already"),
            other,
        );
    }
    pool_refused(
        "agent_listen = '127.0.0.1:9902'\n[pool.chat]\nagent_listen = ‹'0.0.0.0:9902'›",
        "the agent of pool `web` has this address already",
        other,
    );
}

#[test]
fn a_whole_without_an_agent_is_a_warning() {
    let config = with("agent_workers = 8");
    let warnings: Vec<&str> = config.warnings.iter().map(|it| it.0.message.as_str()).collect();
    assert_eq!(warnings, ["this has no effect without `agent_listen`"]);
}
