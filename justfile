# The commands that people use; `just` lists them. CONTRIBUTING.md explains them.

[private]
default:
    @just --list

# Compile everything, tests and benches included
build:
    cargo build --workspace --all-targets

# Run all tests, or those whose name contains FILTER
test *FILTER:
    cargo test --workspace {{FILTER}}

# Format the code
fmt:
    cargo fmt --all

# Check format and lints, as .ci/run does
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --all-features -- -D warnings

# Check licences, banned crates and sources (needs cargo-deny)
deny:
    cargo deny --all-features check bans licenses sources

# Everything that a change must pass
ci:
    .ci/run

# Four workers behind a dispatcher, on http://127.0.0.1:8080/
demo:
    cargo run --release -- demo

# Check a configuration file
check FILE="etc/dispatcher.toml":
    cargo run -q -- check {{FILE}}

# Drive the decision core in virtual time through EVENTS events
simulate EVENTS="10000000":
    SIM_EVENTS={{EVENTS}} cargo test --release -p dispatcher-core --test core simulator -- --nocapture

# Inject random faults into real processes for MINUTES minutes
chaos MINUTES="2":
    cargo run --release -p dispatcher --example chaos -- --minutes {{MINUTES}}

# The same for dispatchers in steer mode, with unmodified servers (root)
steer-chaos MINUTES="2":
    cargo run --release -p dispatcher --example steer_chaos -- --minutes {{MINUTES}}

# Run a fuzz target (needs cargo-fuzz, a nightly toolchain and a C++ compiler)
fuzz TARGET SECONDS="60":
    cargo +nightly fuzz run {{TARGET}} -- -max_total_time={{SECONDS}} -timeout=15

# Compare the dispatcher with its alternatives; `just bench --quick` takes half a minute
bench *ARGUMENTS:
    cargo build --release -p dispatcher
    cargo run --release -p bench -- {{ARGUMENTS}}

# Examine unmodified servers in steered pools and write docs/INTEGRATIONS.md (root; installs servers in target/)
integrations:
    tests/steered/servers/integrations

# Build the API documentation
doc:
    cargo doc --workspace --no-deps --all-features
