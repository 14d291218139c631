//! Models against what `transformers` and `sentence-transformers` compute, and broken model folders.

mod models {
    pub mod batches;
    pub mod broken;
    pub mod common;
    pub mod dense;
    pub mod encode;
    pub mod gated;
    pub mod heads;
    pub mod judge;
    pub mod rampart;
    pub mod reference;
    pub mod variants;
    pub mod vision;
}
