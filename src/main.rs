//! The `eremois` binary: arguments in, exit status out.

use std::process::ExitCode;

// Many small allocations a request on many threads: the system's allocator spends more time on its locks.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    eremois::cli::main()
}
