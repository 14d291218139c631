//! The load generator behind `eremois bench`. Uses no other room: it drives any server.
//!
//! A [`Plan`] says what is sent to whom and how; [`run`] carries it out and returns a [`report::Report`]. The client
//! is light on purpose, because it runs on the cores the server needs: bodies are made before the clock starts,
//! connections are kept alive, answers are read to their end but parsed only where they are to be checked.

pub mod answer;
pub mod client;
pub mod drive;
pub mod objective;
pub mod record;
pub mod report;
pub mod table;
pub mod target;
pub mod texts;
pub mod words;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use answer::Verifier;
use drive::{Driven, Limits, Live, Pace, Prepared, Until, run_step};
use objective::Objective;
use record::Record;
use report::{Report, Workload};
use target::Target;

use crate::{Error, Result};

/// Everything one run does.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The first is the one the objectives are about; with more, rounds alternate between them.
    pub targets: Vec<Target>,
    pub texts: Vec<String>,
    /// How the texts came about, for the report.
    pub source: String,
    /// At least 1. Texts are taken in order; the last request of a pass takes what is left plus the first ones.
    pub inputs_per_request: usize,
    /// TEI's `truncate`.
    pub truncate: bool,
    /// Run one after the other, each for `until`; one pace, or a ramp.
    pub paces: Vec<Pace>,
    pub until: Until,
    /// Before each target's first step, at the first pace, not counted. Zero for none.
    pub warmup: Duration,
    /// How often all targets get their steps; at least 1.
    pub rounds: usize,
    pub limits: Limits,
    /// Check answers; the largest difference allowed between two answers of one text.
    pub verify: Option<f32>,
    pub objectives: Vec<Objective>,
}

/// One step of one target in one round.
#[derive(Debug, Clone)]
pub struct StepRun {
    pub target: usize,
    pub round: usize,
    pub pace: Pace,
    pub record: Record,
}

/// Carries out a plan. `on_step` is told before each step, a warm-up included, for a progress bar.
///
/// Errors: [`Error::Config`] if a target cannot be reached or does not answer a first request with 2xx: better
/// said at once than counted a thousand times.
pub async fn run(plan: Plan, live: Arc<Live>, mut on_step: impl FnMut(&str)) -> Result<Report> {
    let started = SystemTime::now();
    let driven: Vec<Arc<Driven>> = plan.targets.iter().map(|target| Arc::new(prepare(&plan, target))).collect();
    for driven in &driven {
        probe(driven, &plan.limits).await?;
    }
    let mut runs = Vec::new();
    for round in 0..plan.rounds.max(1) {
        for (target, driven) in driven.iter().enumerate() {
            let step = |pace, until, live| run_step(driven.clone(), pace, until, plan.limits.clone(), live);
            if !plan.warmup.is_zero() {
                on_step(&format!("{}: warm-up", driven.target.name));
                // What a warm-up counts goes nowhere.
                step(plan.paces[0], Until::Elapsed(plan.warmup), Arc::default()).await;
            }
            for &pace in &plan.paces {
                on_step(&format!("{}: {}", driven.target.name, report::pace_words(pace)));
                let record = step(pace, plan.until, live.clone()).await;
                runs.push(StepRun { target, round, pace, record });
            }
        }
    }
    let first = driven.first().and_then(|driven| driven.verifier.as_ref());
    let others = driven.iter().skip(1).map(|other| first?.min_cosine(other.verifier.as_ref()?));
    let cosines = std::iter::once(None).chain(others).collect();
    Ok(Report::new(&plan, workload(&plan), runs, cosines, started))
}

fn workload(plan: &Plan) -> Workload {
    let num_words = |text: &String| text.split_whitespace().count();
    Workload {
        source: plan.source.clone(),
        num_texts: plan.texts.len(),
        num_words: plan.texts.iter().map(num_words).sum(),
        inputs_per_request: plan.inputs_per_request,
    }
}

fn prepare(plan: &Plan, target: &Target) -> Driven {
    let num_texts = plan.texts.len();
    let num_requests = num_texts.div_ceil(plan.inputs_per_request);
    let request = |i: usize| {
        let first = i * plan.inputs_per_request;
        let texts: Vec<usize> = (first..first + plan.inputs_per_request).map(|i| i % num_texts).collect();
        let words: Vec<&str> = texts.iter().map(|&i| plan.texts[i].as_str()).collect();
        Prepared { body: target.body(&words, plan.truncate), texts }
    };
    let requests = (0..num_requests).map(request).collect();
    Driven { target: target.clone(), requests, verifier: plan.verify.map(Verifier::new) }
}

/// One request before anything is counted.
async fn probe(driven: &Arc<Driven>, limits: &Limits) -> Result<()> {
    let mut client = client::Client::new(client::Connector::new(), limits.timeout, true);
    let fault = |what: String| {
        let faults = vec![format!("{} ({}): {what}", driven.target.name, driven.target.uri)];
        Error::Config { faults }
    };
    let answer = client.post(&driven.target, driven.requests[0].body.clone()).await;
    let answer = answer.map_err(|failure| fault(format!("no answer to a first request: {}", failure.words())))?;
    if !(200..300).contains(&answer.status) {
        let start = String::from_utf8_lossy(&answer.body[..answer.body.len().min(300)]).into_owned();
        return Err(fault(format!("a first request is answered {}: {start}", answer.status)));
    }
    Ok(())
}

impl Plan {
    /// Checks what types cannot.
    ///
    /// Errors: [`Error::Config`] with all faults.
    pub fn check(&self) -> Result<()> {
        let mut faults = Vec::new();
        let mut want = |holds: bool, fault: &str| {
            if !holds {
                faults.push(fault.to_string());
            }
        };
        want(!self.targets.is_empty(), "no target");
        want(!self.texts.is_empty(), "no texts");
        want(self.inputs_per_request > 0, "inputs per request must be at least 1");
        want(!self.paces.is_empty(), "neither a concurrency nor a rate");
        let sound = |pace: &Pace| match *pace {
            Pace::Closed { concurrency } => (1..=100_000).contains(&concurrency),
            Pace::Open { rate } => rate.is_finite() && rate > 0.0 && rate <= 1e6,
        };
        want(self.paces.iter().all(sound), "a concurrency is 1 to 100000, a rate above 0 and up to 1000000");
        let lasts = match self.until {
            Until::Requests(n) => n > 0,
            Until::Elapsed(window) => !window.is_zero(),
        };
        want(lasts, "a step must last for at least one request or some time");
        let names: std::collections::BTreeSet<&str> = self.targets.iter().map(|t| t.name.as_str()).collect();
        want(names.len() == self.targets.len(), "two targets have the same name");
        if faults.is_empty() { Ok(()) } else { Err(Error::Config { faults }) }
    }
}
