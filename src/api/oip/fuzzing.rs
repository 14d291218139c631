//! From bytes to the elements of tensors, for [`crate::api::fuzzing`].

use bytes::Bytes;

use super::grpc::{convert, pb};
use super::wire::{self, Asking};

/// A request over REST.
pub fn of_rest(body: Bytes, head_len: Option<usize>) {
    if let Ok(asking) = wire::asking_of(body, head_len) {
        read(asking);
    }
}

/// A request over gRPC.
pub fn of_grpc(request: pb::ModelInferRequest) {
    if let Ok(asking) = convert::asking_of(request) {
        read(asking);
    }
}

/// Each tensor as texts and as numbers, whatever it says of itself; both are refused or have as many elements as the shape.
fn read(asking: Asking) {
    for tensor in asking.tensors {
        let num_elements = tensor.shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
        if let Ok(texts) = tensor.clone().bytes() {
            assert_eq!(Some(texts.len()), num_elements);
        }
        if let Ok(ints) = tensor.ints() {
            assert_eq!(Some(ints.len()), num_elements);
        }
    }
}
