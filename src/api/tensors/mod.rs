//! Named tensors, as the Open Inference Protocol and TensorFlow Serving's have them: what a model takes and gives by its
//! task.
//!
//! `signature` alone knows what these tensors are called and shaped, `inputs` makes of them what the engine takes,
//! `outputs` makes them of what it computed. How tensors are written is each protocol's own matter.

mod datatype;
pub mod inputs;
pub mod outputs;
pub mod signature;

pub use datatype::Datatype;
