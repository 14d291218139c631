//! The product algorithms that were timed on this machine, in memory and in a file. Needs no device.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A cuBLASLt algorithm as its words: the library allows to store it for use with the same version of itself.
pub type Words = [u64; 8];

/// Algorithms by product, kept for one GPU model, driver and library version.
///
/// A file that is missing, unreadable or of another machine counts as empty: all that is lost is the time of a tuning.
#[derive(Debug, Default)]
pub struct Algorithms {
    file: Option<PathBuf>,
    kept: Kept,
    is_changed: bool,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
struct Kept {
    gpu: String,
    driver: i32,
    cublaslt: usize,
    /// "f16 bias 4096x768x3072" to the algorithm's words.
    algorithms: BTreeMap<String, Words>,
}

impl Algorithms {
    /// Reads what the folder holds for this GPU, driver and library; without a folder nothing outlives the process.
    ///
    /// Blocks: reads a file of some kilobytes.
    pub fn open(dir: Option<&Path>, gpu: &str, driver: i32, cublaslt: usize) -> Self {
        let file = dir.map(|dir| dir.join(format!("gemm-{}-{driver}-{cublaslt}.json", slug(gpu))));
        let empty = Kept { gpu: gpu.to_string(), driver, cublaslt, algorithms: BTreeMap::new() };
        let read = file.as_deref().and_then(|file| std::fs::read(file).ok());
        let kept = match read.map(|bytes| serde_json::from_slice::<Kept>(&bytes)) {
            Some(Ok(kept)) if (&*kept.gpu, kept.driver, kept.cublaslt) == (gpu, driver, cublaslt) => kept,
            Some(Ok(_)) | None => empty,
            Some(Err(error)) => {
                tracing::warn!(file = %file.as_deref().unwrap_or(Path::new("")).display(), %error, "a file of product algorithms is not read");
                empty
            }
        };
        Self { file, kept, is_changed: false }
    }

    pub fn get(&self, product: &str) -> Option<Words> {
        self.kept.algorithms.get(product).copied()
    }

    /// Keeps the algorithm of a product, in memory until [`Algorithms::save`].
    pub fn put(&mut self, product: String, words: Words) {
        self.is_changed |= self.kept.algorithms.insert(product, words) != Some(words);
    }

    /// Writes the file if there is something new. A folder that cannot be written is told of once a call, and no error.
    pub fn save(&mut self) {
        let Some(file) = self.file.as_deref().filter(|_| self.is_changed) else { return };
        self.is_changed = false;
        if let Err(error) = write(file, &self.kept) {
            tracing::warn!(file = %file.display(), %error, "product algorithms are not kept: the next start times them again");
        }
    }
}

/// Into a file beside it first: two servers that start at once must not see half a file.
fn write(file: &Path, kept: &Kept) -> std::io::Result<()> {
    let text = serde_json::to_vec_pretty(kept)?;
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let beside = file.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&beside, text)?;
    std::fs::rename(beside, file)
}

/// A name as part of a file's name: "NVIDIA H100 80GB HBM3" becomes "nvidia-h100-80gb-hbm3".
fn slug(name: &str) -> String {
    let plain: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { ' ' }).collect();
    plain.split_whitespace().collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_timed_is_found_again_on_the_same_machine_only() {
        let dir = tempfile::tempdir().unwrap();
        let open = |gpu, driver, version| Algorithms::open(Some(dir.path()), gpu, driver, version);
        let mut algorithms = open("NVIDIA H100", 13000, 130100);
        assert_eq!(algorithms.get("p"), None);
        algorithms.put("p".to_string(), [u64::MAX, 1, 2, 3, 4, 5, 6, 7]);
        algorithms.save();
        assert_eq!(open("NVIDIA H100", 13000, 130100).get("p"), Some([u64::MAX, 1, 2, 3, 4, 5, 6, 7]));
        for other in
            [open("NVIDIA A100", 13000, 130100), open("NVIDIA H100", 12080, 130100), open("NVIDIA H100", 13000, 1)]
        {
            assert_eq!(other.get("p"), None);
        }
    }

    #[test]
    fn a_broken_file_and_no_folder_are_an_empty_store() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("gemm-g-1-2.json"), "{").unwrap();
        let mut algorithms = Algorithms::open(Some(dir.path()), "g", 1, 2);
        assert_eq!(algorithms.get("p"), None);
        algorithms.put("p".to_string(), [0; 8]);
        algorithms.save();
        assert_eq!(Algorithms::open(Some(dir.path()), "g", 1, 2).get("p"), Some([0; 8]));

        let mut nowhere = Algorithms::open(None, "g", 1, 2);
        nowhere.put("p".to_string(), [0; 8]);
        nowhere.save();
        let mut unwritable = Algorithms::open(Some(&dir.path().join("gemm-g-1-2.json")), "g", 1, 2);
        unwritable.put("p".to_string(), [0; 8]);
        unwritable.save();
    }
}
