//! A model of images on one device: trunk, head, rows.

use super::{Item, VisionTrunk};
use crate::model::embed::{Headed, by_name};
use crate::model::head::Head;
use crate::model::pack::PackedInput;
use crate::model::{Backend, InFlight};
use crate::request::ModelName;
use crate::{Error, Result};

/// A model of images on one device.
pub(super) struct VisionBackend {
    pub trunk: VisionTrunk,
    pub head: Head,
    pub name: ModelName,
    /// Rows of the word embeddings; 1 without texts.
    pub vocab_size: usize,
    /// Longest sequence in tokens, of images too.
    pub longest: usize,
    pub hidden_size: usize,
    pub is_cuda: bool,
}

impl Backend for VisionBackend {
    fn launch(&self, batch: PackedInput) -> Result<Box<dyn InFlight>> {
        batch.check(self.vocab_size, self.longest, self.hidden_size)?;
        let item = |i: usize| match batch.values_of(i) {
            [] => Item::Text(&batch.input_ids[batch.cu_seqlens[i] as usize..batch.cu_seqlens[i + 1] as usize]),
            values => Item::Image(values),
        };
        let items: Vec<Item> = (0..batch.num_seqs()).map(item).collect();
        let rows = self.trunk.forward(&items).and_then(|(hidden, bounds)| {
            // None of these heads looks at token ids.
            self.head.rows(&hidden, &bounds, &[], &batch.rows)
        });
        let rows = rows.map_err(|e: Error| by_name(&self.name, e))?;
        Ok(Box::new(Headed { rows, name: self.name.clone() }))
    }

    fn hangs_for_good(&self) -> bool {
        self.is_cuda
    }
}
