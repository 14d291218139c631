//! Doors for the fuzz targets of `tests/fuzz` into what reads clients' bytes: the modules that do are private, and the targets are
//! a package of their own. Built for the feature `fuzzing`, and for the test that replays the targets' seeds.
//!
//! None of them says whether bytes are right: a panic is all that a target looks for.

use bytes::Bytes;
use prost::Message;
use serde::de::DeserializeOwned;

use super::body::{of_value, parse};
use super::oip::fuzzing::{of_grpc, of_rest};
use super::oip::{InferBody, grpc, repository};
use super::{app, cohere, inputs, openai, rank, tei, tfs};

/// A request of the Open Inference Protocol over REST: two bytes, little-endian, of the length of its JSON, and the body. The length
/// 65535 stands for a request that does not say it.
pub fn oip_rest(bytes: &[u8]) {
    let Some((len, body)) = bytes.split_first_chunk::<2>() else { return };
    let head_len = Some(usize::from(u16::from_le_bytes(*len))).filter(|&len| len != usize::from(u16::MAX));
    of_rest(Bytes::copy_from_slice(body), head_len);
}

/// The same over gRPC: a `ModelInferRequest`.
pub fn oip_grpc(bytes: &[u8]) {
    if let Ok(request) = grpc::pb::ModelInferRequest::decode(bytes) {
        of_grpc(request);
    }
}

/// One body, as every route of JSON would read it.
pub fn json(bytes: &[u8]) {
    read::<app::create::InferenceBody>(bytes);
    read::<app::records::FeedbackBody>(bytes);
    read::<openai::embeddings::EmbeddingsBody>(bytes);
    read::<openai::batches::BatchBody>(bytes);
    read::<tei::EmbedBody>(bytes);
    read::<tei::similarity::SimilarityBody>(bytes);
    read::<tei::MainTaskBody>(bytes);
    read::<tei::heads::PredictBody>(bytes);
    read::<tei::heads::RerankBody>(bytes);
    read::<tei::heads::TokensBody>(bytes);
    read::<tei::tokens::TokenizeBody>(bytes);
    read::<tei::tokens::DecodeBody>(bytes);
    read::<rank::RankBody>(bytes);
    read::<cohere::embed::EmbedBody>(bytes);
    read::<InferBody>(bytes);
    read::<repository::IndexBody>(bytes);
    read::<tfs::predict::TensorsBody>(bytes);
    if let Ok(inputs) = parse::<inputs::Inputs>(bytes) {
        let num_inputs = inputs.0.len();
        if let Ok(checked) = inputs.checked("input", 64) {
            assert!(checked.len() == num_inputs && num_inputs <= 64);
        }
    }
}

/// As bytes, and as the routes that look at the JSON first read it.
fn read<T: DeserializeOwned>(bytes: &[u8]) {
    let _ = parse::<T>(bytes);
    if let Ok(value) = serde_json::from_slice(bytes) {
        let _ = of_value::<T>(value);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    type Target = fn(&[u8]);

    /// The seeds are what fuzzing began with and what it found.
    #[test]
    fn seeds_of_the_fuzz_targets_panic_nowhere() {
        let targets: [(&str, Target); 3] =
            [("oip_rest", super::oip_rest), ("oip_grpc", super::oip_grpc), ("json", super::json)];
        for (name, target) in targets {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(name);
            let mut num_seeds = 0;
            for entry in std::fs::read_dir(dir).unwrap() {
                target(&std::fs::read(entry.unwrap().path()).unwrap());
                num_seeds += 1;
            }
            assert!(num_seeds > 3, "{name}");
        }
    }
}
