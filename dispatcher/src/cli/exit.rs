//! Exit codes, after sysexits.h, so that scripts and service managers can tell failures apart.

use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Wrong arguments (`EX_USAGE`).
    Usage = 64,
    /// What was named is not what the command can be done to, such as a worker that is leaving or a pool that starts no
    /// processes (`EX_DATAERR`).
    DataErr = 65,
    /// No worker or pool has the name given (`EX_NOINPUT`).
    NoInput = 66,
    /// Nobody listens on the admin socket; or another dispatcher has ours (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// The system is short of something: threads, descriptors (`EX_OSERR`).
    OsErr = 71,
    /// A socket or directory cannot be made (`EX_CANTCREAT`).
    CantCreate = 73,
    /// Reading or writing failed (`EX_IOERR`).
    IoErr = 74,
    /// Try again (`EX_TEMPFAIL`).
    TempFail = 75,
    /// The other side does not speak our protocol (`EX_PROTOCOL`).
    Protocol = 76,
    /// Not permitted (`EX_NOPERM`).
    NoPermission = 77,
    /// The configuration has a mistake, or cannot be read (`EX_CONFIG`).
    Config = 78,
}

impl Exit {
    /// The number the process ends with.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// For programs, where the dispatcher itself has not said what is wrong.
    pub fn problem(self) -> &'static str {
        match self {
            Exit::Ok => "none",
            Exit::Usage => "invalid",
            Exit::DataErr => "conflict",
            Exit::NoInput => "not_found",
            Exit::Unavailable => "not_running",
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
