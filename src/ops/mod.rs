//! The operations models are made of: each a candle custom op with a CPU forward and a place for its
//! CUDA forward. `unsafe` lives only here, each with its obligations.

impl From<candle_core::Error> for crate::Error {
    fn from(error: candle_core::Error) -> Self {
        crate::Error::Internal { cause: error.to_string() }
    }
}
