//! Settings: raw as typed, then checked once, all faults reported together.
