//! The report as a table for people.

use std::fmt::Write;

use super::report::{Comparison, Figures, Report, StepReport};

/// The whole report, lines ending in a line break.
pub fn render(report: &Report) -> String {
    let mut rows = vec![HEAD.map(String::from).to_vec()];
    for target in &report.targets {
        for step in &target.steps {
            rows.push(row(&target.name, &step.step, &step.total));
            if step.rounds.len() > 1 {
                rows.extend(step.rounds.iter().enumerate().map(|(i, f)| row("", &format!("  round {}", i + 1), f)));
            }
        }
    }
    let work = &report.workload;
    let mut out = format!(
        "{} texts ({}), {} words, {} a request\n\n",
        work.num_texts, work.source, work.num_words, work.inputs_per_request
    );
    out += &align(&rows);
    out.push('\n');
    for target in &report.targets {
        for step in &target.steps {
            out += &oddities(&format!("{}, {}", target.name, step.step), step);
        }
        if let Some(cosine) = target.min_cosine {
            line(&mut out, &format!("{}: smallest cosine to {} {cosine:.6}", target.name, report.targets[0].name));
        }
    }
    for comparison in &report.comparisons {
        line(&mut out, &compared(comparison));
    }
    for verdict in &report.objectives {
        let word = if verdict.met { "met" } else { "MISSED" };
        let what = format!("{} at {}: {} (limit {})", verdict.objective, verdict.step, verdict.got, verdict.limit);
        line(&mut out, &format!("{word}: {what}"));
    }
    out
}

const HEAD: [&str; 12] = [
    "target", "step", "requests", "ok", "req/s", "inputs/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms",
    "max ms",
];

fn row(target: &str, step: &str, figures: &Figures) -> Vec<String> {
    let mut row = vec![target.to_string(), step.to_string()];
    row.push(figures.num_requests.to_string());
    row.push(figures.num_ok.to_string());
    row.push(format!("{:.1}", figures.requests_per_s));
    row.push(format!("{:.1}", figures.inputs_per_s));
    row.push(figures.tokens_per_s.map_or("-".into(), |t| format!("{t:.0}")));
    match &figures.latency_ms {
        Some(l) => row.extend([l.p50, l.p90, l.p99, l.p99_9, l.max].map(three_digits)),
        None => row.extend(["-"; 5].map(String::from)),
    }
    row
}

/// As many decimals as the histogram is good for.
fn three_digits(ms: f64) -> String {
    match ms {
        ms if ms >= 100.0 => format!("{ms:.0}"),
        ms if ms >= 10.0 => format!("{ms:.1}"),
        ms if ms >= 1.0 => format!("{ms:.2}"),
        ms => format!("{ms:.3}"),
    }
}

/// Names to the left, numbers to the right.
fn align(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| match i {
            0 | 1 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        line(&mut out, cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    out
}

/// What is not as it should be, or not as one would think.
fn oddities(name: &str, step: &StepReport) -> String {
    let figures = &step.total;
    let mut out = String::new();
    let mut bad: Vec<String> =
        figures.statuses.iter().filter(|(s, _)| !(200..300).contains(*s)).map(|(s, n)| format!("{n} × {s}")).collect();
    bad.extend(figures.failures.iter().map(|(failure, n)| format!("{n} × {}", failure.words())));
    if !bad.is_empty() {
        let percent = figures.error_rate * 100.0;
        line(&mut out, &format!("{name}: {percent:.2} % without a good answer: {}", bad.join(", ")));
    }
    if figures.num_wrong > 0 {
        let examples = figures.wrong_examples.join("; ");
        line(&mut out, &format!("{name}: {} wrong answers: {examples}", figures.num_wrong));
    }
    if figures.num_late > 0 {
        let (late, most) = (figures.num_late, three_digits(figures.max_behind_ms));
        let why = "no connection was free, or this client was not fast enough; the wait is in the latencies";
        line(&mut out, &format!("{name}: {late} sent late, up to {most} ms: {why}"));
    }
    out
}

fn compared(c: &Comparison) -> String {
    format!(
        "{} / {} at {}: {:.2} × (rounds {:.2} to {:.2}); medians {:.1} and {:.1} req/s",
        c.first, c.other, c.step, c.ratio, c.min_ratio, c.max_ratio, c.first_requests_per_s, c.other_requests_per_s
    )
}

fn line(out: &mut String, line: &str) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "{line}");
}
