//! `eremois models`: pull, import, list, verify, quantize.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use clap::builder::PossibleValuesParser;
use clap::{Subcommand, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use serde_json::json;

use super::fail;
use crate::config::{Loaded, Sources};
use crate::model::hub::{Hub, Progress, PullRequest, pull};
use crate::model::install::{Installed, TASKS_OF_FILES, import};
use crate::model::keras;
use crate::model::prove::prove;
use crate::model::quantize::{Target, quantize};
use crate::model::repository::{Layout, ModelEntry, Repository};
use crate::{Error, Result};

/// What `eremois models` can do.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// List the models of the repository.
    List {
        /// Print JSON, one object with all that is known of each model.
        #[arg(long)]
        json: bool,
    },
    /// Fetch a model from the hub, check it, load it once, and put it into the repository.
    ///
    /// HF_ENDPOINT (or the setting ai.model_endpoint) names a mirror, HF_TOKEN a token for gated and private
    /// models. A pull that was cut goes on where it stopped.
    Pull {
        /// The model, and a branch, tag or commit if not the main branch.
        #[arg(value_name = "ORG/NAME[@REV]")]
        model: String,
        /// Take this GGUF file instead of the safetensors.
        #[arg(long)]
        file: Option<String>,
        /// What it is to do [default: what its files say it was made for].
        #[arg(long, value_parser = PossibleValuesParser::new(TASKS_OF_FILES))]
        task: Option<String>,
        /// Serve it under this name [default: NAME].
        #[arg(long)]
        name: Option<String>,
    },
    /// Copy a Hugging Face folder or a GGUF file into the repository, after loading it once; or a Keras model:
    /// `import keras FILE`.
    #[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
    Import {
        /// The folder with config.json, tokenizer.json and *.safetensors, or one GGUF file.
        #[arg(required = true)]
        path: Option<PathBuf>,
        /// Serve it under this name [default: the folder's or file's].
        #[arg(long)]
        name: Option<String>,
        /// What it is to do [default: what its files say it was made for].
        #[arg(long, value_parser = PossibleValuesParser::new(TASKS_OF_FILES))]
        task: Option<String>,
        #[command(subcommand)]
        from: Option<ImportFrom>,
    },
    /// Check checksums, load, and compute once; exits 1 naming what is wrong.
    Verify {
        /// Names, NAME@VERSION or paths [default: every model and version of the repository].
        models: Vec<String>,
    },
    /// Write a model's safetensors as one GGUF file with llama.cpp's names.
    Quantize {
        /// A name of the repository or a Hugging Face folder.
        model: String,
        /// What matrices are written as; vectors stay f32.
        #[arg(long, value_enum, default_value = "q8_0")]
        to: Format,
        /// The file to write [default: model-<FORMAT>.gguf in the model's folder].
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
}

/// Other forms of models that are imported.
#[derive(Debug, Subcommand)]
pub enum ImportFrom {
    /// A Keras model, Sequential or functional, as a tensor model.
    Keras {
        /// What `model.save` wrote: FILE.keras or FILE.h5.
        file: PathBuf,
        /// Serve it under this name [default: the file's].
        #[arg(long)]
        name: Option<String>,
        /// The shape of a row, where the model leaves sizes open; once an input.
        #[arg(long, value_name = "INPUT=SIZE,SIZE,…")]
        shape: Vec<String>,
    },
}

/// A GGUF tensor format, as people write it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// 8 bits a value and a scale for each 32: a quarter of f32, cosine near 0.9998.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits a value and a scale for each 32: an eighth of f32, visibly less exact.
    #[value(name = "q4_0")]
    Q4_0,
    /// Half precision.
    F16,
    /// As it was, in one file.
    F32,
}

/// Runs one of them.
pub fn run(command: ModelsCommand, sources: &Sources) -> ExitCode {
    let done = sources.load().and_then(|loaded| {
        let models = Repository::locate(loaded.settings.ai.models_dir.as_deref());
        match command {
            ModelsCommand::List { json } => list(&models, json),
            ModelsCommand::Pull { model, file, name, task } => {
                let request = PullRequest { file, name, task, ..PullRequest::parse(&model)? };
                pull(&hub(&loaded), &models, &request, &Bar::default()).map(|i| told(&i))
            }
            ModelsCommand::Import { from: Some(ImportFrom::Keras { file, name, shape }), .. } => {
                let shapes = shape.iter().map(|text| keras::parse_shape(text)).collect::<Result<_>>()?;
                keras::import(&models, &file, name.as_deref(), &shapes).map(|i| told(&i))
            }
            ModelsCommand::Import { path, name, task, from: None } => {
                // clap asks for it where there is no subcommand.
                let path = path.unwrap_or_default();
                import(&models, &path, name.as_deref(), task.as_deref()).map(|i| told(&i))
            }
            ModelsCommand::Verify { models: names } => verify(&models, &names),
            ModelsCommand::Quantize { model, to, output } => write_gguf(&models, &model, to, output),
        }
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn hub(loaded: &Loaded) -> Hub {
    Hub { endpoint: loaded.hub.endpoint.clone(), token: loaded.hub.token.clone(), ..Hub::default() }
}

fn told(installed: &Installed) {
    let Installed { name, version, dir, new } = installed;
    let what = if *new { "is" } else { "was already there as" };
    println!("{name} {what} version {version} in {}", dir.display());
}

fn list(models: &Repository, as_json: bool) -> Result<()> {
    let found = models.list()?;
    if as_json {
        let list: Vec<_> = found.iter().map(|(name, entry)| describe(name, entry)).collect();
        let document = json!({"models_dir": models.root(), "models": list});
        println!("{document:#}");
        return Ok(());
    }
    if found.is_empty() {
        println!("no models in {}; get one with `eremois models pull ORG/NAME`", models.root().display());
        return Ok(());
    }
    let mut rows = vec![["NAME", "VERSION", "TASK", "SIZE", "LICENCE", "FROM"].map(str::to_string)];
    for (name, entry) in &found {
        rows.push(match entry {
            Ok(entry) => row(name, entry),
            Err(e) => {
                [name.clone(), "-".into(), "broken".into(), "-".into(), "-".into(), e.to_string().replace('\n', "; ")]
            }
        });
    }
    let width = |i: usize| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..rows[0].len()).map(width).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &w)| format!("{cell:w$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    }
    Ok(())
}

fn row(name: &str, entry: &ModelEntry) -> [String; 6] {
    let latest = *entry.versions.last().unwrap_or(&1);
    let spec = entry.spec(latest);
    let more = if entry.versions.len() > 1 { format!(" (of {})", entry.versions.len()) } else { String::new() };
    let size = HumanBytes(num_bytes(entry, latest)).to_string();
    [
        name.to_string(),
        format!("{latest}{more}"),
        spec.task,
        size,
        spec.licence.unwrap_or("-".into()),
        from(entry, latest),
    ]
}

/// Where a version came from, in a few words.
fn from(entry: &ModelEntry, version: u64) -> String {
    match &entry.layout {
        Layout::Manifest(manifest) => {
            let from = manifest.versions.get(&version).map(|v| v.provenance.clone()).unwrap_or_default();
            let with = |what: String, version: Option<String>| match version {
                Some(version) => format!("{what}@{}", version.chars().take(12).collect::<String>()),
                None => what,
            };
            match (from.repository, from.package) {
                (Some(repository), _) => with(repository, from.revision),
                (None, Some(package)) => format!("package {}", with(package, from.package_version)),
                (None, None) => from.note.unwrap_or_else(|| "-".into()),
            }
        }
        Layout::Versions | Layout::Folder => "a folder without manifest".to_string(),
        Layout::File => "a GGUF file".to_string(),
    }
}

fn num_bytes(entry: &ModelEntry, version: u64) -> u64 {
    fn below(dir: &std::path::Path) -> u64 {
        let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
        let sizes = entries.flatten().map(|e| match e.metadata() {
            Ok(kind) if kind.is_dir() => below(&e.path()),
            Ok(kind) => kind.len(),
            Err(_) => 0,
        });
        sizes.sum()
    }
    match entry.layout {
        Layout::File => std::fs::metadata(&entry.path).map_or(0, |m| m.len()),
        _ => below(&entry.version_dir(version)),
    }
}

fn describe(name: &str, entry: &Result<ModelEntry>) -> serde_json::Value {
    let entry = match entry {
        Ok(entry) => entry,
        Err(e) => return json!({"name": name, "error": e.to_string()}),
    };
    let manifest = match &entry.layout {
        Layout::Manifest(manifest) => Some(manifest),
        Layout::Versions | Layout::Folder | Layout::File => None,
    };
    let sizes: Vec<u64> = entry.versions.iter().map(|&v| num_bytes(entry, v)).collect();
    json!({"name": name, "path": entry.path, "versions": entry.versions, "num_bytes": sizes, "manifest": manifest})
}

/// Every fault of every model is told before the command fails: an operator wants the whole list.
fn verify(models: &Repository, names: &[String]) -> Result<()> {
    let mut all = Vec::new();
    if names.is_empty() {
        for (name, entry) in models.list()? {
            match entry {
                Ok(entry) => {
                    all.extend(entry.versions.clone().into_iter().map(|v| (name.clone(), Ok((entry.clone(), v)))))
                }
                Err(e) => all.push((name, Err(e))),
            }
        }
    } else {
        all.extend(names.iter().map(|name| (name.clone(), models.find(name))));
    }
    if all.is_empty() {
        println!("no models in {}", models.root().display());
    }
    let mut faults = Vec::new();
    for (name, found) in all {
        match found.and_then(|(entry, version)| check(&entry, version)) {
            Ok(words) => println!("{words}"),
            Err(e) => faults.push(format!("{name}: {e}")),
        }
    }
    if faults.is_empty() { Ok(()) } else { Err(Error::Config { faults }) }
}

fn check(entry: &ModelEntry, version: u64) -> Result<String> {
    let num_bytes = entry.verify_files(version)?;
    let info = prove(&entry.spec(version))?;
    let checksums = match &entry.layout {
        Layout::Manifest(_) => format!("checksums of {} right", HumanBytes(num_bytes)),
        Layout::Versions | Layout::Folder | Layout::File => "no checksums (no manifest)".to_string(),
    };
    let (name, architecture, hidden) = (&entry.name, &info.architecture, info.dimensions);
    Ok(format!("{name} version {version}: {checksums}; {architecture}, {hidden} dimensions, computes"))
}

fn write_gguf(models: &Repository, model: &str, to: Format, output: Option<PathBuf>) -> Result<()> {
    let target = match to {
        Format::Q8_0 => Target::Q8_0,
        Format::Q4_0 => Target::Q4_0,
        Format::F16 => Target::F16,
        Format::F32 => Target::F32,
    };
    let (entry, version) = models.find(model)?;
    let spec = entry.spec(version);
    let path = output.unwrap_or_else(|| spec.dir.join(format!("model-{}.gguf", target.name())));
    let written = quantize(&spec, target, &path)?;
    let kinds: Vec<String> = written.num_tensors.iter().map(|(kind, n)| format!("{n} {kind}")).collect();
    let share = written.num_bytes as f64 / written.num_bytes_f32 as f64 * 100.0;
    println!("{}: {} bytes, {share:.1} % of f32", path.display(), written.num_bytes);
    println!("tensors: {}", kinds.join(", "));
    if !written.left_out.is_empty() {
        println!("left out, no embedding needs them: {}", written.left_out.join(", "));
    }
    Ok(())
}

/// A bar a file on a terminal, a line a file elsewhere.
#[derive(Default)]
struct Bar {
    /// Only the pulling thread draws; the lock is for `&self`.
    current: Mutex<Option<ProgressBar>>,
}

impl Bar {
    fn with(&self, change: impl FnOnce(&mut Option<ProgressBar>)) {
        // A panic while drawing leaves nothing half done that matters.
        change(&mut self.current.lock().unwrap_or_else(|e| e.into_inner()));
    }
}

impl Progress for Bar {
    fn begin(&self, file: &str, size: u64, have: u64) {
        if !std::io::stderr().is_terminal() {
            let rest = if have > 0 { format!(", going on from {}", HumanBytes(have)) } else { String::new() };
            eprintln!("{file}: {}{rest}", HumanBytes(size));
            return;
        }
        let template = "{msg:32!} {wide_bar} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>5}";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(size).with_style(style).with_message(file.to_string()).with_position(have);
        bar.reset_eta();
        self.with(|current| *current = Some(bar));
    }

    fn advance(&self, num_bytes: u64) {
        self.with(|current| current.iter().for_each(|bar| bar.inc(num_bytes)));
    }

    fn end(&self, _file: &str) {
        self.with(|current| current.take().iter().for_each(|bar| bar.finish()));
    }
}
