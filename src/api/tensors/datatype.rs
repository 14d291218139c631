//! The types of tensors' elements, by the names that each protocol has for them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::model::signature;

/// A type of elements, written as the Open Inference Protocol does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Datatype {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    Bf16,
    /// Of any length each; a text is its UTF-8.
    Bytes,
}

impl Datatype {
    /// The name in requests and metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Uint8 => "UINT8",
            Self::Uint16 => "UINT16",
            Self::Uint32 => "UINT32",
            Self::Uint64 => "UINT64",
            Self::Int8 => "INT8",
            Self::Int16 => "INT16",
            Self::Int32 => "INT32",
            Self::Int64 => "INT64",
            Self::Fp16 => "FP16",
            Self::Fp32 => "FP32",
            Self::Fp64 => "FP64",
            Self::Bf16 => "BF16",
            Self::Bytes => "BYTES",
        }
    }

    /// The name in a model's configuration, as Triton has it.
    pub fn config_name(self) -> String {
        match self {
            Self::Bytes => "TYPE_STRING".to_string(),
            other => format!("TYPE_{}", other.as_str()),
        }
    }

    /// TensorFlow's name.
    pub fn tensorflow(self) -> &'static str {
        match self {
            Self::Bool => "DT_BOOL",
            Self::Uint8 => "DT_UINT8",
            Self::Uint16 => "DT_UINT16",
            Self::Uint32 => "DT_UINT32",
            Self::Uint64 => "DT_UINT64",
            Self::Int8 => "DT_INT8",
            Self::Int16 => "DT_INT16",
            Self::Int32 => "DT_INT32",
            Self::Int64 => "DT_INT64",
            Self::Fp16 => "DT_HALF",
            Self::Fp32 => "DT_FLOAT",
            Self::Fp64 => "DT_DOUBLE",
            Self::Bf16 => "DT_BFLOAT16",
            Self::Bytes => "DT_STRING",
        }
    }

    /// Whether its values are whole numbers.
    pub fn is_integer(self) -> bool {
        !matches!(self, Self::Bool | Self::Fp16 | Self::Fp32 | Self::Fp64 | Self::Bf16 | Self::Bytes)
    }
}

impl From<signature::Datatype> for Datatype {
    fn from(datatype: signature::Datatype) -> Self {
        match datatype {
            signature::Datatype::Bool => Self::Bool,
            signature::Datatype::U8 => Self::Uint8,
            signature::Datatype::U16 => Self::Uint16,
            signature::Datatype::U32 => Self::Uint32,
            signature::Datatype::U64 => Self::Uint64,
            signature::Datatype::I8 => Self::Int8,
            signature::Datatype::I16 => Self::Int16,
            signature::Datatype::I32 => Self::Int32,
            signature::Datatype::I64 => Self::Int64,
            signature::Datatype::F16 => Self::Fp16,
            signature::Datatype::Bf16 => Self::Bf16,
            signature::Datatype::F32 => Self::Fp32,
            signature::Datatype::F64 => Self::Fp64,
        }
    }
}
