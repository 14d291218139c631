//! Models against what `transformers` and `sentence-transformers` compute, and broken model folders.

mod models {
    pub mod common;
    pub mod reference;
}
