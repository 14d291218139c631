//! The house rules that a machine can check. Each message says what to do; each rule is shown to fail on a
//! sample that breaks it.

#[path = "tidy/source.rs"]
mod source;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use source::Source;

/// What each room may name of the others, besides the shared words. Its own files always; `app` sees all but
/// what stands above it. The table is the dependency rule of docs/architecture.md, read downwards.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("lib", &["api", "app", "cli", "config", "inference", "jobs", "load", "model", "ops", "serve", "store"]),
    ("cli", &["app", "config", "inference", "load", "model", "ops", "serve", "store"]),
    ("app", &["api", "config", "inference", "jobs", "model", "ops", "serve", "store"]),
    ("config", &["api", "jobs", "model", "ops", "serve", "store"]),
    ("api", &["inference", "jobs", "model", "serve", "store"]),
    ("jobs", &["inference", "model", "serve", "store"]),
    ("inference", &["model", "serve", "store"]),
    ("serve", &["model"]),
    ("store", &[]),
    ("model", &["ops"]),
    ("ops", &[]),
    ("load", &[]),
    ("request", &[]),
    ("output", &[]),
    ("error", &[]),
    ("metrics", &[]),
];

/// Plain words for everyone, and what the crate's root re-exports of them.
const SHARED: &[&str] = &["request", "output", "error", "metrics", "Error", "Result"];

/// Crates that belong to certain rooms.
const CRATES: &[(&str, &[&str])] = &[
    ("axum", &["api", "app"]),
    ("tower_http", &["api"]),
    ("tonic", &["api"]),
    ("tonic_health", &["api"]),
    ("tonic_reflection", &["api"]),
    ("hyper", &["api", "app", "jobs", "load"]),
    ("utoipa", &["api"]),
    ("utoipa_swagger_ui", &["api"]),
    ("candle_core", &["model", "ops"]),
    ("candle_nn", &["model", "ops"]),
    ("cudarc", &["ops"]),
    ("nvml_wrapper", &["ops"]),
    ("libc", &["ops"]),
    ("gemm", &["ops"]),
    ("tokenizers", &["model"]),
    ("image", &["model"]),
    ("fast_image_resize", &["model"]),
    ("hf_hub", &["model"]),
    ("hdf5_pure", &["model"]),
    ("zip", &["model"]),
    ("mongodb", &["store"]),
    ("redis", &["store"]),
    ("rusqlite", &["store"]),
    ("moka", &["store"]),
    ("age", &["store"]),
    ("zstd", &["api", "store"]),
    ("brotli", &["api"]),
    ("flate2", &["api"]),
    ("clap", &["main", "cli"]),
    ("anyhow", &["main", "cli"]),
    ("metrics_exporter_prometheus", &["metrics"]),
];

/// Files where a microsecond counts: read at one sitting.
const HOT: &[&str] = &["src/serve/queue.rs", "src/serve/policy.rs", "src/serve/batch.rs", "src/serve/worker.rs"];

// ---- the rules -------------------------------------------------------------------------------------------------

fn rooms(source: &Source) -> Vec<String> {
    let Some(room) = source.room() else { return Vec::new() };
    let Some((_, allowed)) = MAY_NAME.iter().find(|(name, _)| *name == room) else {
        return vec![format!(
            "{}: room `{room}` is not in MAY_NAME of tests/tidy.rs: add it with what it may use",
            source.path
        )];
    };
    let mut faults = Vec::new();
    for path in source.paths() {
        let root = path.segments[0].as_str();
        let (Some(target), true) = (path.segments.get(1), root == "crate" || root == "eremois") else { continue };
        let is_room = MAY_NAME.iter().any(|(name, _)| name == target);
        if is_room && target != room && !SHARED.contains(&target.as_str()) && !allowed.contains(&target.as_str()) {
            faults.push(format!(
                "{}:{}: `{room}` names `{target}`; it may name {allowed:?}: move the shared part down, or hand it in from above",
                source.path, path.line
            ));
        }
    }
    faults
}

fn crates(source: &Source) -> Vec<String> {
    let Some(room) = source.room() else { return Vec::new() };
    let mut faults = Vec::new();
    for path in source.paths() {
        let Some((name, homes)) = CRATES.iter().find(|(name, _)| *name == path.segments[0]) else { continue };
        if !homes.contains(&room) {
            faults.push(format!(
                "{}:{}: the crate {name} stays in {homes:?}: put a plain type of our own between",
                source.path, path.line
            ));
        }
    }
    faults
}

fn environment(source: &Source) -> Vec<String> {
    const READS: [&str; 6] = ["var", "var_os", "vars", "vars_os", "set_var", "remove_var"];
    if source.room().is_none_or(|room| room == "config") {
        return Vec::new();
    }
    let fault = |line| format!("{}:{line}: the environment is read in config alone: take a setting", source.path);
    let reads = source
        .paths()
        .into_iter()
        .filter(|path| path.segments.windows(2).any(|pair| pair[0] == "env" && READS.contains(&pair[1].as_str())));
    // clap's `#[arg(env = "…")]` reads it too.
    let tokens = source.tokens();
    let clap = tokens.windows(2).enumerate().filter(|(i, pair)| {
        pair[0].1 == "env" && pair[1].1 == "=" && *i > 0 && matches!(tokens[i - 1].1.as_str(), "(" | ",")
    });
    reads.map(|path| fault(path.line)).chain(clap.map(|(_, pair)| fault(pair[0].0))).collect()
}

fn unsafe_code(source: &Source) -> Vec<String> {
    if source.room().is_none_or(|room| room == "ops") {
        return Vec::new();
    }
    let found = source.tokens().into_iter().filter(|(_, token)| token == "unsafe");
    found
        .map(|(line, _)| format!("{}:{line}: unsafe stays in src/ops: wrap it there in a safe function", source.path))
        .collect()
}

fn macros(source: &Source) -> Vec<String> {
    let room = source.room();
    let tokens = source.tokens();
    let mut faults = Vec::new();
    for (i, pair) in tokens.windows(2).enumerate() {
        if pair[1].1 != "!" || tokens.get(i + 2).is_some_and(|t| t.1 == "=") {
            continue;
        }
        let advice = match pair[0].1.as_str() {
            "todo" | "unimplemented" => "finish it or leave it out",
            "dbg" => "take it out",
            "println" | "print" | "eprintln" | "eprint"
                if room.is_some_and(|r| !["main", "cli", "app"].contains(&r)) =>
            {
                "a library does not print: log with tracing, or return it to cli or app"
            }
            _ => continue,
        };
        faults.push(format!("{}:{}: {}!: {advice}", source.path, pair[0].0, pair[0].1));
    }
    faults
}

fn unwraps(source: &Source) -> Vec<String> {
    if source.room().is_none() || is_test_file(&source.path) {
        return Vec::new();
    }
    let tokens = source.tokens();
    let found = tokens.windows(4).filter(|w| w[0].1 == "." && w[1].1 == "unwrap" && w[2].1 == "(" && w[3].1 == ")");
    found
        .map(|w| format!("{}:{}: unwrap(): return an Error, or expect(\"why it cannot fail\")", source.path, w[1].0))
        .collect()
}

fn length(source: &Source) -> Vec<String> {
    if source.room().is_none() || is_test_file(&source.path) {
        return Vec::new();
    }
    let limit = if HOT.contains(&source.path.as_str()) { 200 } else { 400 };
    let got = source.num_lines_before_tests();
    if got <= limit {
        return Vec::new();
    }
    vec![format!("{}: {got} lines before its tests, the limit is {limit}: split it by idea", source.path)]
}

fn documented(source: &Source) -> Vec<String> {
    const ITEMS: [&str; 9] = ["fn", "struct", "enum", "trait", "const", "static", "type", "async", "unsafe"];
    if source.room().is_none_or(|room| room == "main") || is_test_file(&source.path) {
        return Vec::new();
    }
    let lines: Vec<&str> = source.text.lines().take(source.num_lines_before_tests()).collect();
    let mut faults = Vec::new();
    if !lines.first().is_some_and(|line| line.starts_with("//!")) {
        faults.push(format!("{}:1: begins without a `//!` line that says what is in it", source.path));
    }
    for (i, line) in lines.iter().enumerate() {
        let Some(rest) = line.trim_start().strip_prefix("pub ") else { continue };
        if !rest.split(' ').next().is_some_and(|word| ITEMS.contains(&word)) {
            continue;
        }
        // A method that fits a glance says what it is by its name; a comment would repeat it.
        let method_end = lines[i..].iter().position(|line| *line == "    }");
        let is_short_method = line.starts_with("    pub ") && method_end.is_some_and(|len| len <= 5);
        if !is_short_method && !is_doc(&lines[..i]) {
            faults.push(format!("{}:{}: a public item without a `///` line: say what it is", source.path, i + 1));
        }
    }
    faults
}

/// Whether the last of these lines, attributes left out, is a `///` line. rustfmt begins each attribute on a line of
/// its own and closes it at the same depth.
fn is_doc(mut above: &[&str]) -> bool {
    while let Some((last, rest)) = above.split_last() {
        let last_trimmed = last.trim_start();
        if last_trimmed.starts_with("///") {
            return true;
        }
        if last_trimmed.starts_with("#[") {
            above = rest;
        } else if last_trimmed.ends_with(")]") {
            let indent = last.len() - last_trimmed.len();
            let opens =
                |line: &&str| line.len() - line.trim_start().len() == indent && line.trim_start().starts_with("#[");
            let Some(start) = rest.iter().rposition(opens) else { return false };
            above = &rest[..start];
        } else {
            return false;
        }
    }
    false
}

/// Words that mark unfinished work, put together here so that this file does not find itself.
fn leftovers(path: &str, text: &str) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("#[ign", "ore")];
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let is_word = |at: usize, mark: &str| {
            let around = [line[..at].chars().next_back(), line[at + mark.len()..].chars().next()];
            around.iter().flatten().all(|c| !c.is_alphanumeric() && *c != '_')
        };
        if let Some(mark) = marks.iter().find(|m| line.match_indices(**m).any(|(at, _)| is_word(at, m))) {
            faults.push(format!("{path}:{}: {mark}: do it now, or say what is so and why", number + 1));
        }
    }
    faults
}

/// Names of metrics in a text: `eremois_…` with a unit or count, as word.
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("eremois_")).map(str::to_string).collect()
}

fn metrics_documented(sources: &[Source], docs: &str) -> Vec<String> {
    let mut in_code = BTreeSet::new();
    for source in sources.iter().filter(|s| s.room().is_some()) {
        let lines = source.text.lines().take(source.num_lines_before_tests());
        // A name is a whole literal: `"eremois_queue_depth"`.
        for literal in lines.flat_map(|line| line.split('"').skip(1).step_by(2)) {
            if metric_names(literal).contains(literal) {
                in_code.insert(literal.to_string());
            }
        }
    }
    // A histogram's series, as queries name them, are the histogram.
    let plain = |name: String| match ["_bucket", "_sum", "_count"].iter().find_map(|series| name.strip_suffix(series)) {
        Some(histogram) if in_code.contains(histogram) => histogram.to_string(),
        _ => name,
    };
    let in_docs: BTreeSet<String> = metric_names(docs).into_iter().map(plain).collect();
    let missing = in_code.difference(&in_docs).map(|m| format!("docs/metrics.md: {m} is missing: add its line"));
    let gone = in_docs.difference(&in_code).map(|m| format!("docs/metrics.md: {m} is in no source: take it out"));
    missing.chain(gone).collect()
}

/// Paths of the project that a document names in backticks or links must be there.
fn dead_paths(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    const ROOTS: [&str; 9] =
        ["src/", "tests/", "docs/", "scripts/", "benches/", "models/", "deploy/", "kernels/", ".ci/"];
    let mut faults = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for word in line.split(|c: char| c.is_whitespace() || "`()[]\"',;|#".contains(c)) {
            let word = word.trim_start_matches("./").trim_end_matches(['.', ':']);
            let is_pattern = word.contains(['<', '{', '*', '$', '…', '=', '\\']);
            if ROOTS.iter().any(|root| word.starts_with(root)) && !is_pattern && !exists(word) {
                faults.push(format!("{path}:{}: `{word}` is not there: mend the document", number + 1));
            }
        }
    }
    faults
}

// ---- the tree --------------------------------------------------------------------------------------------------

fn is_test_file(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// Text files below the project's folder `dir` with one of these endings, or any for an empty list.
fn texts(dir: &str, endings: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join(dir)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.map(|entry| entry.expect("a folder of the project can be listed")) {
            let path = entry.path();
            let name = path.strip_prefix(root).expect("below the root").to_string_lossy().replace('\\', "/");
            if path.is_dir() {
                folders.push(path);
            } else if endings.is_empty() || endings.iter().any(|ending| name.ends_with(ending)) {
                // What is not UTF-8 is data.
                if let Ok(text) = fs::read_to_string(&path) {
                    found.push((name, text));
                }
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<Source> {
    let dirs = ["src", "tests", "benches"];
    let files = dirs.iter().flat_map(|dir| texts(dir, &[".rs"]));
    let found: Vec<Source> = files.map(|(path, text)| Source::new(&path, &text)).collect();
    assert!(found.iter().any(|s| s.path == "src/lib.rs"), "the walk over the tree finds no src/lib.rs");
    found
}

fn check(rule: impl Fn(&Source) -> Vec<String>) {
    report(sources().iter().flat_map(rule).collect());
}

fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn rooms_name_only_what_lies_below_them() {
    check(rooms);
}

#[test]
fn crates_stay_in_their_rooms() {
    check(crates);
}

#[test]
fn the_environment_is_read_in_config_alone() {
    check(environment);
}

#[test]
fn unsafe_stays_in_ops() {
    check(unsafe_code);
}

#[test]
fn nothing_is_unfinished_or_prints_from_the_library() {
    check(macros);
}

#[test]
fn nothing_unwraps_without_a_reason() {
    check(unwraps);
}

#[test]
fn files_are_short() {
    check(length);
}

#[test]
fn public_items_say_what_they_are() {
    check(documented);
}

#[test]
fn no_marks_of_unfinished_work() {
    let dirs = ["src", "tests", "benches", "kernels", "scripts", "docs", "deploy", ".ci"];
    let is_data = |path: &str| path.contains("/fixtures/") || path.contains("/runs/") || path.ends_with(".json");
    let files = dirs.iter().flat_map(|dir| texts(dir, &[])).filter(|(path, _)| !is_data(path));
    report(files.flat_map(|(path, text)| leftovers(&path, &text)).collect());
}

#[test]
fn every_metric_is_documented() {
    let docs = texts("docs", &["docs/metrics.md"]).pop().expect("docs/metrics.md lists the metrics").1;
    report(metrics_documented(&sources(), &docs));
}

#[test]
fn documents_name_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).expect("README.md is there");
    let mut files = texts("docs", &[".md"]);
    files.push(("README.md".to_string(), readme));
    report(files.iter().flat_map(|(path, text)| dead_paths(path, text, |p| root.join(p).exists())).collect());
}

// ---- each rule can fail ----------------------------------------------------------------------------------------

fn num_faults(rule: impl Fn(&Source) -> Vec<String>, path: &str, text: &str) -> usize {
    rule(&Source::new(path, text)).len()
}

#[test]
fn rule_rooms_sees_upward_and_sideways_names() {
    assert_eq!(num_faults(rooms, "src/ops/linear.rs", "use crate::model::Rows;\n"), 1);
    assert_eq!(num_faults(rooms, "src/serve/queue.rs", "use crate::{Error, api::status, model::{pack, Rows}};\n"), 1);
    assert_eq!(num_faults(rooms, "src/serve/mod.rs", "fn f() { super::load::run() }\n"), 1);
    assert_eq!(num_faults(rooms, "src/load/mod.rs", "fn f(e: &eremois::serve::Engine) {}\n"), 1);
    assert_eq!(num_faults(rooms, "src/attic/mod.rs", "\n"), 1);
    // Not these: a lower room, shared words, comments, text, the own tests, a module of the same name inside a room.
    let fine = "use crate::model::Rows;\nuse crate::{Error, metrics};\n// crate::api::x\nlet a = \"crate::api\";\n\
                super::load();\n#[cfg(test)]\nmod tests { use crate::api::router; }\n";
    assert_eq!(num_faults(rooms, "src/serve/queue.rs", fine), 0);
}

#[test]
fn rule_crates_sees_a_stray_crate() {
    assert_eq!(num_faults(crates, "src/serve/mod.rs", "use axum::Router;\n"), 1);
    assert_eq!(num_faults(crates, "src/api/tei.rs", "fn f(t: &::candle_core::Tensor) {}\n"), 1);
    assert_eq!(num_faults(crates, "src/model/bert.rs", "use {cudarc::driver, candle_core::Tensor};\nuse cudarc;\n"), 2);
    assert_eq!(num_faults(crates, "src/api/mod.rs", "use axum::Router;\nuse crate::axum::x;\nlet axum = 1;\n"), 0);
}

#[test]
fn rule_environment_sees_reads() {
    assert_eq!(
        num_faults(environment, "src/app.rs", "let a = std::env::var(\"A\");\nuse std::env::{self, vars};\n"),
        2
    );
    assert_eq!(num_faults(environment, "src/cli/models.rs", "#[arg(long, env = \"HF_TOKEN\")]\n"), 1);
    assert_eq!(num_faults(environment, "src/config/mod.rs", "std::env::vars();\n"), 0);
    assert_eq!(num_faults(environment, "src/app.rs", "std::env::current_exe(); env!(\"X\"); let env = 1;\n"), 0);
}

#[test]
fn rule_unsafe_sees_a_block_outside_ops() {
    assert_eq!(num_faults(unsafe_code, "src/model/weights.rs", "let m = unsafe { map(f) };\n"), 1);
    assert_eq!(num_faults(unsafe_code, "src/ops/linear.rs", "unsafe { go() }\n"), 0);
    assert_eq!(num_faults(unsafe_code, "src/api/mod.rs", "// unsafe\n/* unsafe */ let a = r#\"unsafe\"#;\n"), 0);
}

#[test]
fn rule_macros_sees_unfinished_code_and_prints() {
    let unfinished = concat!("fn f() { to", "do!() }\nfn g() { unimple", "mented!(\"x\") }\ndb", "g!(1);\n");
    assert_eq!(num_faults(macros, "src/api/mod.rs", unfinished), 3);
    assert_eq!(num_faults(macros, "src/api/mod.rs", "println!();\n"), 1);
    assert_eq!(num_faults(macros, "src/cli/serve.rs", "println!();\nif print != 1 {}\n"), 0);
}

#[test]
fn rule_unwraps_sees_one() {
    assert_eq!(num_faults(unwraps, "src/app.rs", "let a = b\n    .unwrap();\n"), 1);
    assert_eq!(num_faults(unwraps, "src/app.rs", "a.unwrap_or(1); a.expect(\"it was checked\");\n"), 0);
    assert_eq!(num_faults(unwraps, "src/app.rs", "#[cfg(test)]\nmod tests { fn f() { a.unwrap(); } }\n"), 0);
}

#[test]
fn rule_length_counts_up_to_the_tests() {
    assert_eq!(num_faults(length, "src/app.rs", &"a();\n".repeat(401)), 1);
    assert_eq!(num_faults(length, "src/serve/queue.rs", &"a();\n".repeat(201)), 1);
    let tested = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", "a();\n".repeat(200), "b();\n".repeat(500));
    assert_eq!(num_faults(length, "src/serve/queue.rs", &tested), 0);
}

#[test]
fn rule_documented_sees_a_bare_item() {
    assert_eq!(num_faults(documented, "src/app.rs", "pub fn f() {}\n"), 2);
    let method = |body: &str| format!("//! A file.\nimpl A {{\n    pub fn len(&self) {{\n{body}    }}\n}}\n");
    assert_eq!(num_faults(documented, "src/app.rs", &method("        self.len\n")), 0);
    assert_eq!(num_faults(documented, "src/app.rs", &method(&"        a();\n".repeat(5))), 1);
    let fine = "//! A file.\n\n/// A thing.\n#[derive(Debug)]\n#[path(\n    a(b),\n)]\npub struct A {\n    pub field: u8,\n}\npub mod b;\npub(crate) fn c() {}\n";
    assert_eq!(num_faults(documented, "src/app.rs", fine), 0);
}

#[test]
fn rule_leftovers_sees_marks() {
    let text = concat!("a\n// TO", "DO: later\n#[ign", "ore]\nFIX", "ME\nTO", "DOS\n");
    assert_eq!(leftovers("src/app.rs", text).len(), 3);
}

#[test]
fn rule_metrics_sees_both_sides() {
    let code = Source::new("src/serve/mod.rs", "counter!(\"eremois_a_total\"); log(\"eremois_x is no name\");\n");
    assert_eq!(metrics_documented(&[code], "`eremois_b_seconds`").len(), 2);
}

#[test]
fn rule_dead_paths_sees_one() {
    let text = "See `src/app.rs`, [map](docs/gone.md#top) and `models/<name>/x`.\n";
    assert_eq!(dead_paths("README.md", text, |path| path == "src/app.rs").len(), 1);
}

#[test]
fn source_blanks_literals_and_comments() {
    let text = "let a = 'x'; let s: &'a str = \"q\\\"//\"; // b\nbr##\"raw \"# x\"##; /* a /* b */ c */ d";
    let code = source::blank(text);
    assert_eq!(code.len(), text.len());
    let words: Vec<&str> = code.split_whitespace().collect();
    let expected = ["let", "a", "=", "'", "';", "let", "s:", "&'a", "str", "=", "\"", "\";", "br", "#;", "d"];
    assert_eq!(words, expected);
}
