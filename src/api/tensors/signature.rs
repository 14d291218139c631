//! From a model's task to its tensors: the one place that knows what they are called and shaped.
//!
//! | task | takes | gives |
//! |---|---|---|
//! | embed | `text` | `embedding` FP32 [n, dimensions] |
//! | embed_all | `text` | `token_embeddings` FP32 [n, longest, hidden_size], `lengths` INT32 [n] |
//! | sparse | `text` | `indices` INT64 and `values` FP32 [n, longest], `lengths` |
//! | classify | `text`, `text_pair` or not | `scores` FP32 [n, labels] |
//! | rerank | `query`, `text` | `scores` FP32 [n, 1] |
//! | token_classify | `text` | `scores` FP32 [n, longest, labels], `lengths` |
//! | fill_mask | `text` | `token_ids` INT64 and `scores` FP32 [n, most masks, k], `lengths` |
//!
//! | infer | the model's own | the model's own |
//!
//! Models of images take `image`, a file an input, instead or beside.
//!
//! Instead of its texts each takes `input_ids`, with what a tokeniser puts beside them. The batch is the first dimension of
//! every tensor, as the clients of both protocols have it; so what is ragged is padded with zeros behind, and `lengths` says
//! how much of each row is not.

use std::borrow::Cow;

use super::Datatype;
use crate::model::signature::{self as model, Modality};
use crate::model::{DEFAULT_TOP_K, ModelInfo};
use crate::request::Task;
use crate::{Error, Result};

/// A text.
pub const TEXT: &str = "text";
/// What is read together with the text.
pub const TEXT_PAIR: &str = "text_pair";
/// What texts are ranked by.
pub const QUERY: &str = "query";
/// A file of an image.
pub const IMAGE: &str = "image";
/// Token ids.
pub const INPUT_IDS: &str = "input_ids";
/// 1 for each token that counts, 0 behind them.
pub const ATTENTION_MASK: &str = "attention_mask";
/// Which text of a pair a token is of.
pub const TOKEN_TYPE_IDS: &str = "token_type_ids";

/// A tensor as metadata describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: Cow<'static, str>,
    pub datatype: Datatype,
    /// The inputs of a request first; `None` where the length is the request's.
    pub shape: Vec<Option<usize>>,
    /// Whether a request of this form may be without it.
    pub is_optional: bool,
}

impl TensorSpec {
    fn new(name: &'static str, datatype: Datatype, shape: &[Option<usize>]) -> Self {
        Self { name: name.into(), datatype, shape: shape.to_vec(), is_optional: false }
    }

    fn of(spec: &model::TensorSpec, datatype: Datatype) -> Self {
        let shape = [None].into_iter().chain(spec.shape.iter().copied().map(Some)).collect();
        Self { name: spec.name.clone().into(), datatype, shape, is_optional: false }
    }

    fn optional(self) -> Self {
        Self { is_optional: true, ..self }
    }

    /// The dimensions of an input as Triton's clients know them, -1 for any length: what has no dimension beside the
    /// batch's has one of a single value, because their programs send nothing without one. It is taken either way.
    pub fn input_dims(&self) -> Vec<i64> {
        let dims = self.shape.iter().map(|dim| dim.map_or(-1, |dim| dim as i64));
        if self.shape.len() == 1 { dims.chain([1]).collect() } else { dims.collect() }
    }

    /// The dimensions without the batch's, as a configuration has them, and whether they stand for none at all: the
    /// configuration knows no tensor without a dimension beside the batch's.
    pub fn config_dims(&self) -> (Vec<i64>, bool) {
        let dims: Vec<i64> = self.shape.iter().skip(1).map(|dim| dim.map_or(-1, |dim| dim as i64)).collect();
        if dims.is_empty() { (vec![1], true) } else { (dims, false) }
    }
}

/// What the tensors of a form are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Texts, each alone or with a second one.
    Texts,
    /// Texts, each with its query; a single query is that of all.
    Queries,
    /// Token ids, with or without a mask and types.
    TokenIds,
    /// A file an input.
    Images,
    /// The inputs of a tensor model, all of them.
    Tensors,
}

/// A way to write a request's inputs. A request uses one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    pub written: Written,
    /// The first names the request's inputs in errors.
    pub tensors: Vec<TensorSpec>,
}

impl Form {
    /// The tensor that inputs are named by.
    pub fn name(&self) -> &str {
        // Every form has one, see `Signature::of`.
        self.tensors.first().map_or("inputs", |spec| &spec.name)
    }
}

/// The tensors of a model's task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub task: Task,
    /// The usual one first. Not empty.
    pub forms: Vec<Form>,
    /// Not empty.
    pub outputs: Vec<TensorSpec>,
}

impl Signature {
    /// The tensors of one of the tasks that the model does.
    pub fn of(info: &ModelInfo, task: Task) -> Self {
        let texts = |name| TensorSpec::new(name, Datatype::Bytes, &[None]);
        let ids = |name| TensorSpec::new(name, Datatype::Int64, &[None, None]);
        let floats = |name, shape: &[Option<usize>]| TensorSpec::new(name, Datatype::Fp32, shape);
        let longs = |name, shape: &[Option<usize>]| TensorSpec::new(name, Datatype::Int64, shape);
        let lengths = TensorSpec::new("lengths", Datatype::Int32, &[None]);
        let (hidden_size, num_labels) = (Some(info.hidden_size), Some(info.labels.len()));
        let outputs = match &task {
            Task::Embed => vec![floats("embedding", &[None, Some(info.dimensions)])],
            Task::EmbedAll => vec![floats("token_embeddings", &[None, None, hidden_size]), lengths],
            Task::Sparse => vec![longs("indices", &[None, None]), floats("values", &[None, None]), lengths],
            Task::Classify => vec![floats("scores", &[None, num_labels])],
            Task::TokenClassify => vec![floats("scores", &[None, None, num_labels]), lengths],
            Task::FillMask { .. } => {
                vec![longs("token_ids", &[None, None, None]), floats("scores", &[None, None, None]), lengths]
            }
            Task::Infer => {
                info.signature.outputs.iter().map(|spec| TensorSpec::of(spec, given_as(spec.dtype))).collect()
            }
        };
        if info.signature.takes(Modality::Tensors) {
            let tensors = info.signature.inputs.iter().map(|spec| TensorSpec::of(spec, spec.dtype.into())).collect();
            return Self { task, forms: vec![Form { written: Written::Tensors, tensors }], outputs };
        }
        let usual = match &task {
            Task::Classify if info.task == "rerank" => {
                Form { written: Written::Queries, tensors: vec![texts(TEXT), texts(QUERY)] }
            }
            Task::Classify => Form { written: Written::Texts, tensors: vec![texts(TEXT), texts(TEXT_PAIR).optional()] },
            _ => Form { written: Written::Texts, tensors: vec![texts(TEXT)] },
        };
        let beside = [ids(ATTENTION_MASK).optional(), ids(TOKEN_TYPE_IDS).optional()];
        let token_ids =
            Form { written: Written::TokenIds, tensors: [ids(INPUT_IDS)].into_iter().chain(beside).collect() };
        let image = Form { written: Written::Images, tensors: vec![texts(IMAGE)] };
        let of = |modality, forms: Vec<Form>| info.signature.takes(modality).then_some(forms).into_iter().flatten();
        let forms = of(Modality::Text, vec![usual, token_ids]).chain(of(Modality::Image, vec![image])).collect();
        Self { task, forms, outputs }
    }

    /// The tensors of what the model was made for.
    pub fn main(info: &ModelInfo) -> Self {
        Self::of(info, info.main_task())
    }

    /// The tensors of the task that is named so, or of the main one.
    ///
    /// Errors: `Invalid` naming the tasks that the model does.
    pub fn named(info: &ModelInfo, task: Option<&str>) -> Result<Self> {
        let Some(task) = task else { return Ok(Self::main(info)) };
        let does = tasks(info);
        let known = || does.iter().map(|task| word(info, task)).collect::<Vec<_>>().join(", ");
        let reason = || format!("model `{}` does not do `{task}`; it does {}", info.name, known());
        let found = does.iter().find(|known| [known.as_str(), word(info, known)].contains(&task));
        let missing = || Error::Invalid { field: "task".to_string(), reason: reason() };
        found.map(|task| Self::of(info, task.clone())).ok_or_else(missing)
    }

    /// The tensors of the usual form: what metadata and configuration list. Both stand for one request, which some clients
    /// fill in whole; that the other forms exist, [`Signature::others`] says.
    pub fn usual(&self) -> &[TensorSpec] {
        self.forms.first().map_or(&[], |form| &form.tensors)
    }

    /// The tensors of each other form.
    pub fn others(&self) -> impl Iterator<Item = &[TensorSpec]> {
        self.forms.iter().skip(1).map(|form| &form.tensors[..])
    }

    /// All tensors that a request may have, whatever its form: the first form's are those that a client sends which knows
    /// no other.
    pub fn inputs(&self) -> Vec<TensorSpec> {
        let of_form = |(i, form): (usize, &Form)| {
            form.tensors.clone().into_iter().map(move |spec| if i == 0 { spec } else { spec.optional() })
        };
        self.forms.iter().enumerate().flat_map(of_form).collect()
    }

    /// Errors: `Invalid` for a name that is no output's.
    pub fn output(&self, name: &str) -> Result<&TensorSpec> {
        self.outputs.iter().find(|output| output.name == name).ok_or_else(|| {
            let known = self.outputs.iter().map(|output| &*output.name).collect::<Vec<_>>().join(", ");
            let reason = format!("no output is named `{name}`; known: {known}");
            Error::Invalid { field: "outputs".to_string(), reason }
        })
    }

    /// Whether the values of an output are classes' scores, one row an input.
    pub fn has_classes(&self, output: &TensorSpec) -> bool {
        matches!(self.task, Task::Classify | Task::Infer)
            && output.datatype == Datatype::Fp32
            && output.shape.len() == 2
    }
}

/// What a tensor model's output is answered as: it is computed in floats, and whole numbers are told as such.
fn given_as(datatype: model::Datatype) -> Datatype {
    match datatype {
        model::Datatype::I64 => Datatype::Int64,
        model::Datatype::I32 => Datatype::Int32,
        _ => Datatype::Fp32,
    }
}

/// The tasks that a model does, its main one first.
pub fn tasks(info: &ModelInfo) -> Vec<Task> {
    let main = info.main_task();
    let fill_mask = Task::FillMask { top_k: DEFAULT_TOP_K, targets: None };
    let all = [Task::Embed, Task::EmbedAll, Task::Sparse, Task::Classify, Task::TokenClassify, fill_mask];
    let others = all.into_iter().filter(|task| *task != main && info.does(task)).collect::<Vec<_>>();
    [main].into_iter().chain(others).collect()
}

/// What a task of a model is called: as its manifest does, where that has a word of its own.
pub fn word(info: &ModelInfo, task: &Task) -> &'static str {
    match task {
        Task::Classify if info.task == "rerank" => "rerank",
        task => task.as_str(),
    }
}
