//! The end of a process that must not wait for its devices.

use std::io::Write;

/// Ends the process now with this status. Nothing is unwound and nothing that is registered for the end is run: the
/// CUDA driver's own part of that would wait for a device that hangs.
pub fn exit_at_once(status: u8) -> ! {
    // What was printed is kept back while standard output is no terminal. Standard error is not.
    let _ = std::io::stdout().flush();
    // SAFETY: takes a number and does not return. What it leaves out, destructors and handlers, may be left out by any
    // program that is killed; files are written by then or never (the server writes none while it ends).
    unsafe { libc::_exit(i32::from(status)) }
}
