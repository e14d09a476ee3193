//! Exit codes from sysexits.h, so that scripts and service managers can tell failures apart.

use std::process::ExitCode;

/// The result of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Success.
    Ok = 0,
    /// Wrong arguments (`EX_USAGE`).
    Usage = 64,
    /// The command does not apply to this worker or pool: a worker that is leaving, a pool that
    /// starts no processes (`EX_DATAERR`).
    DataErr = 65,
    /// No worker or pool has this name (`EX_NOINPUT`).
    NoInput = 66,
    /// No process listens on the admin socket, or another dispatcher uses the sockets of this one
    /// (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// A roll stopped, because a process of the new version did not become ready (`EX_SOFTWARE`).
    Software = 70,
    /// The system is out of a resource: threads, descriptors (`EX_OSERR`).
    OsErr = 71,
    /// A socket or directory cannot be created (`EX_CANTCREAT`).
    CantCreate = 73,
    /// Reading or writing failed (`EX_IOERR`).
    IoErr = 74,
    /// Temporary failure, to be tried again (`EX_TEMPFAIL`).
    TempFail = 75,
    /// The peer does not speak this version of the protocol (`EX_PROTOCOL`).
    Protocol = 76,
    /// Not permitted (`EX_NOPERM`).
    NoPermission = 77,
    /// The configuration has a mistake or cannot be read (`EX_CONFIG`).
    Config = 78,
}

impl Exit {
    /// The exit status of the process.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The `problem` in JSON output, for failures that the dispatcher did not report itself.
    pub fn problem(self) -> &'static str {
        match self {
            Exit::Ok => "none",
            Exit::Usage => "invalid",
            Exit::DataErr => "conflict",
            Exit::NoInput => "not_found",
            Exit::Unavailable => "not_running",
            Exit::Software => "roll_stopped",
            Exit::OsErr => "system",
            Exit::CantCreate => "cannot_create",
            Exit::IoErr => "io",
            Exit::TempFail => "try_again",
            Exit::Protocol => "protocol",
            Exit::NoPermission => "not_permitted",
            Exit::Config => "config",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}
