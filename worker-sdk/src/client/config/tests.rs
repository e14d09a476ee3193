use super::*;

fn env(pairs: &[(&str, &str)]) -> Result<WorkerConfig, Error> {
    WorkerConfig::new().with_variables(|name| {
        let found = pairs.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| OsString::from(value))
    })
}

#[test]
fn the_environment_sets_every_variable_it_documents() {
    let token = "00112233445566778899aabbccddeeff";
    let config = env(&[
        ("DISPATCH_SOCKET", "/run/d.sock"),
        ("DISPATCH_POOL", "web"),
        ("DISPATCH_NAME", "w1"),
        ("DISPATCH_WEIGHT", "3"),
        ("DISPATCH_PRIORITY", "7"),
        ("DISPATCH_ADVERTISE", "[2001:db8::5]:443"),
        ("DISPATCH_MAX_CONNECTIONS", "100"),
        ("DISPATCH_LISTEN", "[::1]:80"),
        ("DISPATCH_JOIN_TIMEOUT", "1m 30s"),
        ("DISPATCH_SAMPLE", "always"),
        ("DISPATCH_SAMPLE_INTERVAL", "250ms"),
        ("DISPATCH_ON_LOSS", "stop"),
        ("DISPATCH_TOKEN", token),
    ])
    .unwrap();
    let expected = WorkerConfig::new()
        .dispatch_socket("/run/d.sock")
        .pool("web")
        .name("w1")
        .weight(3)
        .priority(7)
        .advertise("[2001:db8::5]:443")
        .max_connections(100)
        .listen("[::1]:80")
        .join_timeout(Duration::from_secs(90))
        .sample(Sampling::Always, Duration::from_millis(250))
        .on_dispatcher_loss(OnDispatcherLoss::Stop)
        .token(token.parse().unwrap());
    assert_eq!(config, expected);
}

#[test]
fn an_empty_variable_is_not_set() {
    assert_eq!(
        env(&[("DISPATCH_SOCKET", ""), ("DISPATCH_WEIGHT", "")]).unwrap(),
        WorkerConfig::new()
    );
}

#[test]
fn a_bad_variable_is_named_with_its_value() {
    for (name, value) in [
        ("DISPATCH_WEIGHT", "0"),
        ("DISPATCH_WEIGHT", "70000"),
        ("DISPATCH_PRIORITY", "-1"),
        ("DISPATCH_ADVERTISE", "0.0.0.0:80"),
        ("DISPATCH_ADVERTISE", "[::]:80"),
        ("DISPATCH_ADVERTISE", "*:80"),
        ("DISPATCH_ADVERTISE", "10.0.0.1"),
        ("DISPATCH_ADVERTISE", "host:0"),
        ("DISPATCH_ADVERTISE", "10.0.0.256:80"),
        ("DISPATCH_MAX_CONNECTIONS", "many"),
        ("DISPATCH_POOL", "two words"),
        ("DISPATCH_NAME", "a\nb"),
        ("DISPATCH_SAMPLE", "yes"),
        ("DISPATCH_SAMPLE_INTERVAL", "soon"),
        ("DISPATCH_SAMPLE_INTERVAL", "9ms"),
        ("DISPATCH_JOIN_TIMEOUT", "30"),
        ("DISPATCH_ON_LOSS", "Serve"),
    ] {
        let text = env(&[(name, value)]).unwrap_err().to_string();
        assert!(text.contains(name), "{text}");
        let quoted = [format!("{value:?}"), format!("`{value}`")];
        assert!(quoted.iter().any(|quoted| text.contains(quoted)), "{text}");
    }
    let text = env(&[("DISPATCH_TOKEN", "secret")]).unwrap_err().to_string();
    assert!(text.contains("DISPATCH_TOKEN") && !text.contains("secret"), "{text}");
}

#[test]
fn nothing_to_connect_to_says_what_to_set() {
    let text = WorkerConfig::new().check().unwrap_err().to_string();
    assert!(text.contains("DISPATCH_SOCKET") && text.contains("DISPATCH_LISTEN"), "{text}");
}

#[test]
fn a_file_gives_the_same_settings() {
    let config: WorkerConfig = toml::from_str(
        r#"
        dispatch_socket = "/run/d.sock"
        pool = "web"
        join_timeout = "10s"
        reconnect_min = "20 ms"
        reconnect_max = "2s"
        sample = "never"
        sample_interval = "2s"
        on_dispatcher_loss = "drain"
        token = "00112233445566778899aabbccddeeff"
        "#,
    )
    .unwrap();
    assert_eq!(config.join_timeout, Some(Duration::from_secs(10)));
    assert_eq!(config.reconnect_min, Duration::from_millis(20));
    assert_eq!(config.reconnect_max, Duration::from_secs(2));
    assert_eq!((config.sample, config.sample_interval), (Sampling::Never, Duration::from_secs(2)));
    assert_eq!(config.on_dispatcher_loss, OnDispatcherLoss::Drain);
    assert_eq!(config.weight, 1);
    assert!(config.check().is_ok());
}

#[test]
fn what_is_written_is_read_again_without_the_secret() {
    let config = WorkerConfig::new()
        .dispatch_socket("/run/d.sock")
        .pool("web")
        .max_connections(7)
        .join_timeout(Duration::from_millis(1_500))
        .reconnect(Duration::from_nanos(1), Duration::from_secs(90));
    let text = toml::to_string(&config.clone().token("00".repeat(16).parse().unwrap())).unwrap();
    assert!(!text.contains("token"), "{text}");
    assert_eq!(toml::from_str::<WorkerConfig>(&text).unwrap(), config, "{text}");
    let text = toml::to_string(&config.reconnect(Duration::MAX, Duration::MAX)).unwrap();
    let again = toml::from_str::<WorkerConfig>(&text).unwrap();
    assert!(
        again.reconnect_max >= Duration::from_secs(3_000_000_000),
        "practically unlimited: {text}"
    );
}

#[test]
fn a_file_with_mistakes_is_refused() {
    for (text, says) in [
        ("poool = 'web'", "poool"),
        ("join_timeout = 'soon'", "soon"),
        ("join_timeout = -1", "-1"),
        ("reconnect_max = 2", "a duration with its unit"),
        ("reconnect_min = '5 parsecs'", "parsecs"),
        ("token = 'abc'", "32 hexadecimal"),
        ("weight = 70000", "70000"),
        ("sample = 'yes'", "yes"),
        ("on_dispatcher_loss = 'end'", "`serve`, `drain`, `stop`"),
    ] {
        let error = toml::from_str::<WorkerConfig>(text).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn wrong_values_are_found_before_the_dispatcher_sees_them() {
    let base = || WorkerConfig::new().listen("127.0.0.1:0");
    assert!(base().check().is_ok());
    for bad in [
        base().weight(0),
        base().max_connections(0),
        base().pool(""),
        base().name("x".repeat(65)),
        base().reconnect(Duration::ZERO, Duration::from_secs(1)),
        base().reconnect(Duration::from_secs(2), Duration::from_secs(1)),
        base().sample(Sampling::Auto, Duration::from_millis(9)),
    ] {
        assert!(matches!(bad.check(), Err(Error::Config { .. })), "accepted {bad:?}");
    }
}

#[test]
fn a_default_name_is_always_valid() {
    for program in [
        None,
        Some("/bin/my server"),
        Some("/"),
        Some("/bin/ééééééééééééééééééééééééééééééééééééééééééééé"),
    ] {
        let name = default_name(program.map(Path::new), 4_194_304);
        assert!(is_name(&name), "{name:?}");
        assert!(name.ends_with("-4194304"), "{name:?}");
    }
    assert_eq!(default_name(Some(Path::new("/bin/chat")), 7), "chat-7");
}

#[test]
fn the_default_maximum_leaves_a_reserve() {
    let config = WorkerConfig::new();
    assert!(config.effective_max_connections() >= 1);
    assert_eq!(config.max_connections(9).effective_max_connections(), 9);
}
