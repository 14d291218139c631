//! The recorder and the names every module shares; each module registers what it owns.
