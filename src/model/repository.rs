//! The folder of models: finding, listing, checking and loading them.
