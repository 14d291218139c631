//! The `eremois` binary: arguments in, exit status out.

fn main() {}
