//! `eremois bench`: arguments into a plan, the report out.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::fail;
use crate::load::drive::{Limits, Live, Pace, Until};
use crate::load::objective::Objective;
use crate::load::report::{Report, until_words};
use crate::load::target::{Api, Target};
use crate::load::texts::{self, Lengths};
use crate::load::{Plan, run as run_plan, table};
use crate::{Error, Result};

/// Exit status when the run was carried out, but an objective was missed.
const MISSED: u8 = 2;

/// Put load on an embeddings server, this one or any other, and measure it.
///
/// Exits 0 when all stated objectives are met, 2 when one is missed, 1 when the run could not be carried out.
/// Examples:
///   eremois bench --concurrency 32 --duration 20s --p99 200ms
///   eremois bench --rate 50:200:50 --duration 10s --max-error-rate 1%
///   eremois bench --concurrency 32 --vs tei=http://127.0.0.1:8081,tei --rounds 5
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct BenchArgs {
    /// The server. Without a path, or with /v1, the protocol's path is added.
    #[arg(long, default_value = "http://127.0.0.1:8080", help_heading = "Target")]
    url: String,
    /// The protocol: openai, openai-base64 or tei.
    #[arg(long, default_value = "openai", help_heading = "Target")]
    api: Api,
    /// The `model` field of OpenAI requests.
    #[arg(long, help_heading = "Target")]
    model: Option<String>,
    /// The target's name in the report.
    #[arg(long, default_value = "target", help_heading = "Target")]
    name: String,
    /// A header of every request, to every target; may be repeated.
    #[arg(long, value_name = "NAME: VALUE", help_heading = "Target")]
    header: Vec<String>,
    /// Another server to compare with: rounds alternate between them all. API and model default to the target's.
    #[arg(long, value_name = "NAME=URL[,API[,MODEL]]", help_heading = "Target")]
    vs: Vec<String>,

    /// Closed loop: so many requests at once [default: 32]. FROM:TO:STEP is a ramp; a STEP like x2 multiplies.
    #[arg(long, value_name = "N|RAMP", conflicts_with = "rate", help_heading = "Load")]
    concurrency: Option<String>,
    /// Open loop: Poisson arrivals at so many requests a second; latency counts from the intended send time.
    #[arg(long, value_name = "PER_SECOND|RAMP", help_heading = "Load")]
    rate: Option<String>,
    /// How long each step lasts [default: 10s].
    #[arg(long, value_parser = humantime::parse_duration, conflicts_with = "requests", help_heading = "Load")]
    duration: Option<Duration>,
    /// Each step sends so many requests, instead of lasting a time.
    #[arg(long, help_heading = "Load")]
    requests: Option<usize>,
    /// Load before each target's first step of a round, not counted.
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration, help_heading = "Load")]
    warmup: Duration,
    /// How often each target gets its steps [default: 1, with --vs 3].
    #[arg(long, help_heading = "Load")]
    rounds: Option<usize>,
    /// A request without a whole answer after this has failed.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, help_heading = "Load")]
    timeout: Duration,
    /// Open loop: most connections at once; further arrivals wait for one, and their wait counts.
    #[arg(long, default_value_t = 1000, help_heading = "Load")]
    max_in_flight: usize,
    /// Threads of this client; one is enough for tens of thousands of requests a second.
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    threads: usize,

    /// Lengths of the made texts in tokens: 32, 8..256, 8..256:log-uniform, 64~16 (normal).
    #[arg(long, default_value = "8..256:log-uniform", help_heading = "Texts")]
    lengths: Lengths,
    /// How many different texts.
    #[arg(long, default_value_t = 2000, help_heading = "Texts")]
    num_texts: usize,
    /// The same seed makes the same texts and the same arrival times.
    #[arg(long, default_value_t = 1, help_heading = "Texts")]
    seed: u64,
    /// Texts from a JSONL file instead: strings, or objects with `text`, `input` or `inputs`.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["lengths", "num_texts"], help_heading = "Texts")]
    texts: Option<PathBuf>,
    /// Texts in one request.
    #[arg(long, default_value_t = 1, help_heading = "Texts")]
    inputs: usize,
    /// Ask a TEI server to cut texts that are too long.
    #[arg(long, help_heading = "Texts")]
    truncate: bool,

    /// Check every answer: the number of vectors, finite, of one dimension, and equal for equal texts.
    #[arg(long, help_heading = "Objectives")]
    verify: bool,
    /// Largest difference of any value between two answers of one text.
    #[arg(long, default_value_t = 1e-3, help_heading = "Objectives")]
    verify_tolerance: f32,
    /// Half of the good answers come within this.
    #[arg(long, value_parser = humantime::parse_duration, help_heading = "Objectives")]
    p50: Option<Duration>,
    #[arg(long, value_parser = humantime::parse_duration, help_heading = "Objectives")]
    p90: Option<Duration>,
    #[arg(long, value_parser = humantime::parse_duration, help_heading = "Objectives")]
    p99: Option<Duration>,
    #[arg(long, value_parser = humantime::parse_duration, help_heading = "Objectives")]
    p999: Option<Duration>,
    /// Every good answer comes within this.
    #[arg(long, value_parser = humantime::parse_duration, help_heading = "Objectives")]
    max: Option<Duration>,
    /// Good answers a second.
    #[arg(long, value_name = "PER_SECOND", help_heading = "Objectives")]
    min_rate: Option<f64>,
    /// Share of requests without a good answer: 0.01 or 1%.
    #[arg(long, value_name = "SHARE", value_parser = parse_share, help_heading = "Objectives")]
    max_error_rate: Option<f64>,

    /// Write the whole report as JSON (docs/bench.md explains it); `-` is standard output, without the table.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    json: Option<PathBuf>,
}

/// Runs it and prints the report.
pub fn run(args: &BenchArgs) -> ExitCode {
    let report = match plan(args).and_then(|plan| carry_out(plan, args.threads)) {
        Ok(report) => report,
        Err(e) => return fail(&e),
    };
    if let Err(e) = print(&report, args.json.as_deref()) {
        return fail(&e);
    }
    let missed = report.missed();
    for line in &missed {
        eprintln!("eremois: {line}");
    }
    if missed.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(MISSED) }
}

fn print(report: &Report, json: Option<&std::path::Path>) -> Result<()> {
    let Some(path) = json else {
        print!("{}", table::render(report));
        return Ok(());
    };
    let mut text = serde_json::to_string_pretty(report).map_err(|e| Error::Internal { cause: e.to_string() })?;
    text.push('\n');
    if path.as_os_str() == "-" {
        print!("{text}");
        return Ok(());
    }
    print!("{}", table::render(report));
    let fault = |e: std::io::Error| Error::Config { faults: vec![format!("{}: {e}", path.display())] };
    std::fs::write(path, text).map_err(fault)
}

fn carry_out(plan: Plan, num_threads: usize) -> Result<Report> {
    let mut builder = match num_threads {
        // One thread needs no locks between cores, and leaves the others to the server.
        0 | 1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = builder.worker_threads(num_threads.max(1)).enable_all().build();
    let runtime = runtime.map_err(|e| Error::Internal { cause: format!("the runtime: {e}") })?;
    let live = Arc::new(Live::default());
    let bar = bar(&plan);
    let ticker = draw(bar.clone(), live.clone(), plan.until);
    let report = runtime.block_on(async {
        let ticker = tokio::spawn(ticker);
        let report = run_plan(plan, live, |step| bar.set_message(step.to_string())).await;
        ticker.abort();
        report
    });
    bar.finish_and_clear();
    report
}

/// Hidden by itself where standard error is no terminal.
fn bar(plan: &Plan) -> ProgressBar {
    let num_steps = (plan.targets.len() * plan.paces.len() * plan.rounds.max(1)) as u64;
    let len = match plan.until {
        Until::Requests(n) => num_steps * n as u64,
        Until::Elapsed(window) => num_steps * window.as_millis() as u64 + num_steps * plan.warmup.as_millis() as u64,
    };
    let style = ProgressStyle::with_template("{wide_bar} {elapsed}  {msg}  {prefix}");
    let bar = ProgressBar::new(len);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}

async fn draw(bar: ProgressBar, live: Arc<Live>, until: Until) {
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let done = live.num_done.load(Ordering::Relaxed);
        match until {
            Until::Requests(_) => bar.set_position(done),
            Until::Elapsed(_) => bar.set_position(bar.elapsed().as_millis() as u64),
        }
        let (bad, open) = (live.num_bad.load(Ordering::Relaxed), live.num_in_flight.load(Ordering::Relaxed));
        bar.set_prefix(format!("{done} done, {bad} bad, {open} open"));
    }
}

/// Errors: [`Error::Config`] with all faults of the arguments that clap cannot see.
fn plan(args: &BenchArgs) -> Result<Plan> {
    let mut faults = Vec::new();
    let mut keep = |result: Result<Vec<Target>, String>| result.map_err(|fault| faults.push(fault)).unwrap_or_default();
    let mut targets = keep(target(&args.name, &args.url, args.api, args.model.clone(), args).map(|t| vec![t]));
    for other in &args.vs {
        targets.extend(keep(vs(other, args).map(|t| vec![t])));
    }
    let paces = paces(args).unwrap_or_else(|fault| {
        faults.push(fault);
        Vec::new()
    });
    if !faults.is_empty() {
        return Err(Error::Config { faults });
    }
    let texts = match &args.texts {
        Some(path) => texts::read_jsonl(path)?,
        None => texts::generate(args.num_texts, args.lengths, args.seed),
    };
    let source = match &args.texts {
        Some(path) => path.display().to_string(),
        None => format!("{} tokens, seed {}", args.lengths, args.seed),
    };
    let until = match args.requests {
        Some(n) => Until::Requests(n),
        None => Until::Elapsed(args.duration.unwrap_or(Duration::from_secs(10))),
    };
    let plan = Plan {
        rounds: args.rounds.unwrap_or(if targets.len() > 1 { 3 } else { 1 }),
        targets,
        texts,
        source: format!("{source}; steps of {}", until_words(until)),
        inputs_per_request: args.inputs,
        truncate: args.truncate,
        paces,
        until,
        warmup: args.warmup,
        limits: Limits { timeout: args.timeout, max_in_flight: args.max_in_flight, seed: args.seed },
        verify: args.verify.then_some(args.verify_tolerance),
        objectives: objectives(args),
    };
    plan.check()?;
    Ok(plan)
}

fn target(name: &str, url: &str, api: Api, model: Option<String>, args: &BenchArgs) -> Result<Target, String> {
    let mut target = Target::new(name, url, api, model)?;
    args.header.iter().try_for_each(|line| target.add_header(line))?;
    Ok(target)
}

/// Reads `NAME=URL[,API[,MODEL]]`.
fn vs(text: &str, args: &BenchArgs) -> Result<Target, String> {
    let (name, rest) = text.split_once('=').ok_or_else(|| format!("--vs {text}: NAME=URL[,API[,MODEL]] is needed"))?;
    let mut parts = rest.splitn(3, ',');
    let url = parts.next().unwrap_or_default();
    let api = parts.next().map_or(Ok(args.api), str::parse).map_err(|e| format!("--vs {text}: {e}"))?;
    let model = parts.next().map(String::from).or_else(|| args.model.clone());
    target(name, url, api, model, args).map_err(|e| format!("--vs {text}: {e}"))
}

fn paces(args: &BenchArgs) -> Result<Vec<Pace>, String> {
    match (&args.rate, &args.concurrency) {
        (Some(rate), _) => Ok(ramp(rate)?.into_iter().map(|rate| Pace::Open { rate }).collect()),
        (None, concurrency) => {
            let values = ramp(concurrency.as_deref().unwrap_or("32"))?;
            if values.iter().any(|v| v.fract() != 0.0 || *v < 1.0) {
                return Err("a concurrency is a whole number from 1".into());
            }
            Ok(values.into_iter().map(|v| Pace::Closed { concurrency: v as usize }).collect())
        }
    }
}

/// Most steps of one ramp: more are a typing error.
const MAX_STEPS: usize = 200;

/// Reads `N` or `FROM:TO:STEP`; STEP adds, `xFACTOR` multiplies. TO is included where a step meets it.
fn ramp(text: &str) -> Result<Vec<f64>, String> {
    let number = |s: &str| match s.parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 => Ok(n),
        _ => Err(format!("`{text}`: `{s}` is not a number above 0")),
    };
    let parts: Vec<&str> = text.split(':').collect();
    let (from, to, step) = match parts[..] {
        [one] => return Ok(vec![number(one)?]),
        [from, to, step] => (number(from)?, number(to)?, step),
        _ => return Err(format!("`{text}` is neither a number nor FROM:TO:STEP")),
    };
    let factor = step.strip_prefix('x').map(number).transpose()?;
    if factor.is_some_and(|factor| factor <= 1.0) || from > to {
        return Err(format!("`{text}` does not go up"));
    }
    let addend = if factor.is_none() { number(step)? } else { 0.0 };
    let mut values = vec![from];
    let mut next = from;
    loop {
        next = factor.map_or(next + addend, |factor| next * factor);
        // A hair above, for steps like 0.1 that binary fractions miss.
        if next > to * (1.0 + 1e-9) {
            return Ok(values);
        }
        if values.len() == MAX_STEPS {
            return Err(format!("`{text}` has more than {MAX_STEPS} steps"));
        }
        values.push(next);
    }
}

fn objectives(args: &BenchArgs) -> Vec<Objective> {
    let latencies = [(0.5, args.p50), (0.9, args.p90), (0.99, args.p99), (0.999, args.p999), (1.0, args.max)];
    let latencies = latencies.into_iter().filter_map(|(quantile, limit)| Some((quantile, limit?)));
    let mut all: Vec<Objective> = latencies.map(|(quantile, limit)| Objective::Latency { quantile, limit }).collect();
    all.extend(args.min_rate.map(Objective::MinRate));
    all.extend(args.max_error_rate.map(Objective::MaxErrorRate));
    all.extend(args.verify.then_some(Objective::NothingWrong));
    all
}

/// Reads `0.01` or `1%`.
fn parse_share(text: &str) -> Result<f64, String> {
    let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |percent| (percent, 0.01));
    match number.trim().parse::<f64>() {
        Ok(n) if (0.0..=1.0).contains(&(n * scale)) => Ok(n * scale),
        _ => Err(format!("`{text}` is not a share from 0 to 1, or 0% to 100%")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramps_are_read() {
        assert_eq!(ramp("7").unwrap(), [7.0]);
        assert_eq!(ramp("10:40:10").unwrap(), [10.0, 20.0, 30.0, 40.0]);
        assert_eq!(ramp("1:70:x4").unwrap(), [1.0, 4.0, 16.0, 64.0]);
        assert_eq!(ramp("0.1:0.3:0.1").unwrap().len(), 3);
        for bad in ["", "0", "1:2", "5:1:1", "1:9:x1", "1:9:-1", "1:1000:1", "a", "nan"] {
            assert!(ramp(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn shares_are_read() {
        assert_eq!(parse_share("0.05"), Ok(0.05));
        assert_eq!(parse_share("5%"), Ok(0.05));
        assert!(parse_share("5").is_err() && parse_share("-1%").is_err() && parse_share("x").is_err());
    }
}
