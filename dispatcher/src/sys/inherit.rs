//! A program that inherits descriptors as from a service manager: 3, 4 and so on, and
//! `LISTEN_PID`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString, c_char};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

use super::{MAX_DIGITS, write_own_id};

/// The number of the first descriptor that a program inherits (`SD_LISTEN_FDS_START`).
pub const FIRST_INHERITED: RawFd = 3;

/// The variable with the process id of the program.
const OWN_ID: &str = "LISTEN_PID";

/// What the child had at the numbers that its program is to inherit; see [`keep_numbers`].
#[derive(Debug)]
pub struct Kept(Arc<[AtomicI32]>);

/// The first half of [`run_with_descriptors`], for that many descriptors. To be called before
/// [`super::set_up_child`], because a lower limit of open files could leave no number for a copy.
///
/// The child copies what it has at the numbers 3, 4 and so on: among them may be a descriptor that
/// its program is to inherit, and the pipe through which the standard library reports an error.
pub fn keep_numbers(command: &mut Command, count: usize) -> Kept {
    let kept: Arc<[AtomicI32]> = (0..count).map(|_| AtomicI32::new(NONE)).collect();
    let copies = Arc::clone(&kept);
    let free = FIRST_INHERITED.saturating_add(i32::try_from(count).unwrap_or(i32::MAX));
    let keep = move || {
        for (number, copy) in (FIRST_INHERITED..).zip(copies.iter()) {
            // SAFETY: the call takes numbers, reaches no memory of ours, and fails for what is not
            // open.
            let new = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, free) };
            if new == -1 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EBADF) {
                    return Err(error);
                }
            }
            copy.store(new, Ordering::Relaxed);
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: these are system
    // calls and stores to memory that was allocated before; errors are made of numbers.
    unsafe { command.pre_exec(keep) };
    Kept(kept)
}

/// For a number that is not open.
const NONE: RawFd = -1;

/// Makes the program that `command` starts inherit `descriptors` as 3, 4 and so on, and gives it
/// `LISTEN_PID`, its process id, which only the child knows. There must be as many as were kept,
/// and they must stay open until the process was started.
///
/// The child runs the program itself, in the way of the standard library. So this comes last: what
/// is changed in `command` afterwards has no effect. `command` must not have an `arg0` or a cleared
/// environment.
///
/// # Errors
///
/// A text has a zero byte.
pub fn run_with_descriptors(
    command: &mut Command,
    descriptors: &[BorrowedFd<'_>],
    kept: Kept,
) -> io::Result<()> {
    let Kept(kept) = kept;
    let descriptors: Vec<RawFd> = descriptors.iter().map(BorrowedFd::as_raw_fd).collect();
    let mut arguments = arguments(command)?;
    let mut environment = environment(command)?;
    let run = move || {
        let error = give(&descriptors, &kept).err().unwrap_or_else(|| {
            environment.write_own_id();
            execute(&mut arguments, &mut environment)
        });
        give_back(&kept);
        Err(error)
    };
    // SAFETY: between fork and exec only async-signal-safe operations are allowed: these are system
    // calls, `execvp` as the standard library calls it there, and changes of memory that was
    // allocated before; errors are made of numbers.
    unsafe { command.pre_exec(run) };
    Ok(())
}

/// Gives the descriptors their numbers. Between fork and exec.
fn give(descriptors: &[RawFd], kept: &[AtomicI32]) -> io::Result<()> {
    for (number, &descriptor) in (FIRST_INHERITED..).zip(descriptors) {
        // Another one may have its number by now.
        let own_place = usize::try_from(descriptor - FIRST_INHERITED).ok();
        let copy = own_place.and_then(|place| kept.get(place));
        let source = copy.map_or(descriptor, |copy| copy.load(Ordering::Relaxed));
        // SAFETY: the call takes numbers. What the child had at the number is not used any more:
        // either the program runs, or the copy is put back first.
        if unsafe { libc::dup2(source, number) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Puts back what the child had, for the report of an error. Between fork and exec.
fn give_back(kept: &[AtomicI32]) {
    for (number, copy) in (FIRST_INHERITED..).zip(kept) {
        match copy.load(Ordering::Relaxed) {
            NONE => {
                // SAFETY: the call takes a number, and no value owns what `give` has put there.
                unsafe { libc::close(number) };
            }
            copy => {
                // SAFETY: the call takes numbers, and no value owns what `give` has put there.
                unsafe { libc::dup3(copy, number, libc::O_CLOEXEC) };
            }
        }
    }
}

/// Runs the program, found in the `PATH` of its own environment. Returns only if that failed.
/// Between fork and exec.
fn execute(arguments: &mut Texts, environment: &mut Texts) -> io::Error {
    unsafe extern "C" {
        static mut environ: *const *const c_char;
    }
    let arguments = arguments.array();
    // SAFETY: both arrays end with a null pointer, the texts with a zero byte, and all of them live
    // across the calls. The child has one thread, so nothing else uses the environment meanwhile.
    // There is a program, the first argument.
    unsafe {
        let before = environ;
        environ = environment.array();
        libc::execvp(*arguments, arguments);
        let error = io::Error::last_os_error();
        environ = before;
        error
    }
}

/// Texts for C, each with its zero byte, and an array for their addresses.
struct Texts {
    texts: Vec<Vec<u8>>,
    addresses: Vec<AtomicPtr<c_char>>,
}

impl Texts {
    fn new(texts: Vec<Vec<u8>>) -> Texts {
        // With the null pointer at the end.
        let addresses = (0..=texts.len()).map(|_| AtomicPtr::default()).collect();
        Texts { texts, addresses }
    }

    /// Valid until the texts change. Allocates nothing.
    fn array(&mut self) -> *const *const c_char {
        for (text, address) in self.texts.iter_mut().zip(&mut self.addresses) {
            *address.get_mut() = text.as_mut_ptr().cast();
        }
        // The type has the representation of a pointer.
        self.addresses.as_ptr().cast()
    }

    /// Completes the first text of an [`environment`]. Allocates nothing.
    fn write_own_id(&mut self) {
        let room = self.texts.first_mut().and_then(|own| own.get_mut(OWN_ID.len() + 1..));
        if let Some(room) = room {
            write_own_id(room);
        }
    }
}

/// The program and its arguments.
fn arguments(command: &Command) -> io::Result<Texts> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    Ok(Texts::new(words.map(|word| text(&[word])).collect::<io::Result<_>>()?))
}

/// The environment that `command` would have, and before it room for the process id.
fn environment(command: &Command) -> io::Result<Texts> {
    let mut variables: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => variables.insert(name.to_owned(), value.to_owned()),
            None => variables.remove(name),
        };
    }
    variables.remove(OsStr::new(OWN_ID));
    let mut own = format!("{OWN_ID}=").into_bytes();
    own.resize(own.len() + MAX_DIGITS + 1, 0);
    let others = variables.iter().map(|(name, value)| text(&[name, OsStr::new("="), value]));
    Ok(Texts::new(std::iter::once(Ok(own)).chain(others).collect::<io::Result<_>>()?))
}

fn text(parts: &[&OsStr]) -> io::Result<Vec<u8>> {
    let mut text = parts.iter().map(|part| part.as_bytes()).collect::<Vec<_>>().concat();
    if text.contains(&0) {
        // The error of the standard library.
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "nul byte found in provided data"));
    }
    text.push(0);
    Ok(text)
}

#[cfg(test)]
mod tests;
