//! Named tensors, as the Open Inference Protocol and TensorFlow Serving's have them: what a model takes and gives by its
//! task.
//!
//! `signature` alone knows what these tensors are called and shaped, `inputs` makes of them what the engine takes,
//! `outputs` makes them of what it computed; `nested` reads tensors that are lists in lists of JSON, `written` writes such.
//! Other forms are each protocol's own matter.

mod datatype;
pub mod inputs;
pub mod nested;
pub mod outputs;
pub mod signature;
pub mod written;

pub use datatype::Datatype;
