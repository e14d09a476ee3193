//! The `dispatcher` command.

fn main() -> std::process::ExitCode {
    dispatcher::cli::main()
}
