//! What a model takes and gives, as TensorFlow Serving's `GetModelMetadataResponse` says it in JSON.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use super::signature::{self, Signature};
use crate::api::tensors::signature::TensorSpec;
use crate::model::ModelInfo;

/// The document.
#[derive(Debug, Serialize, ToSchema)]
pub struct Metadata {
    model_spec: ModelSpec,
    metadata: Signatures,
}

/// Which model it is of.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelSpec {
    #[schema(example = "all-MiniLM-L6-v2")]
    name: String,
    /// Always empty: the document has all of them.
    #[schema(example = "")]
    signature_name: &'static str,
    #[schema(example = "1")]
    version: String,
}

/// The name is there twice: that of the metadata, and that of the protobuf's only field.
#[derive(Debug, Serialize, ToSchema)]
pub struct Signatures {
    signature_def: SignatureMap,
}

/// Signatures by their names.
#[derive(Debug, Serialize, ToSchema)]
pub struct SignatureMap {
    signature_def: BTreeMap<String, SignatureDef>,
}

/// One signature.
#[derive(Debug, Serialize, ToSchema)]
pub struct SignatureDef {
    inputs: BTreeMap<String, TensorInfo>,
    outputs: BTreeMap<String, TensorInfo>,
    #[schema(example = "tensorflow/serving/predict")]
    method_name: &'static str,
}

/// One tensor.
#[derive(Debug, Serialize, ToSchema)]
pub struct TensorInfo {
    #[schema(example = "DT_FLOAT")]
    dtype: &'static str,
    tensor_shape: TensorShape,
    /// The name once more: there is no graph whose node it could be.
    #[schema(example = "embedding")]
    name: String,
}

/// A shape, slowest dimension first.
#[derive(Debug, Serialize, ToSchema)]
pub struct TensorShape {
    dim: Vec<Dim>,
    unknown_rank: bool,
}

/// One dimension.
#[derive(Debug, Serialize, ToSchema)]
pub struct Dim {
    /// In quotes, as protobufs write 64 bits in JSON; "-1" for one that each request chooses.
    #[schema(example = "-1")]
    size: String,
    #[schema(example = "")]
    name: &'static str,
}

impl Metadata {
    /// The document of a model.
    pub fn of(info: &ModelInfo) -> Self {
        let signature_def = signature::of(info).iter().map(|s| (s.name.clone(), SignatureDef::of(s))).collect();
        Self {
            model_spec: ModelSpec { name: info.name.to_string(), signature_name: "", version: info.version.clone() },
            metadata: Signatures { signature_def: SignatureMap { signature_def } },
        }
    }
}

impl SignatureDef {
    fn of(signature: &Signature) -> Self {
        let named =
            |specs: &[TensorSpec]| specs.iter().map(|spec| (spec.name.to_string(), TensorInfo::of(spec))).collect();
        Self {
            inputs: named(&signature.form.tensors),
            outputs: named(&signature.outputs),
            method_name: "tensorflow/serving/predict",
        }
    }
}

impl TensorInfo {
    fn of(spec: &TensorSpec) -> Self {
        let dim = |size: &Option<usize>| Dim { size: size.map_or("-1".to_string(), |n| n.to_string()), name: "" };
        let tensor_shape = TensorShape { dim: spec.shape.iter().map(dim).collect(), unknown_rank: false };
        Self { dtype: spec.datatype.tensorflow(), tensor_shape, name: spec.name.to_string() }
    }
}

/// The signatures of the version that is served.
#[utoipa::path(
    get, path = "/v1/models/{id}/metadata", tag = "TensorFlow Serving",
    params(("id" = String, Path, description = "A name from `/v1/models`", example = "all-MiniLM-L6-v2")),
    responses((status = 200, body = Metadata, description = "Its inputs and outputs"), super::super::docs::Refusals),
)]
#[allow(dead_code)] // a page of the document: the route is `super::read`
pub async fn metadata() {}
