//! Settings: where they come from, how they are checked, how they are shown.

use std::path::PathBuf;
use std::time::Duration;

use eremois::Error;
use eremois::config::keys::{KEYS, SECTIONS};
use eremois::config::read::suggest;
use eremois::config::reload::changes;
use eremois::config::{Loaded, Origin, Settings, Sources, show};

fn sources(environment: &[(&str, &str)], overrides: &[&str]) -> Sources {
    Sources {
        file: Some(PathBuf::from("eremois.toml")),
        environment: environment.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        overrides: overrides.iter().map(|o| o.to_string()).collect(),
    }
}

fn load(text: &str) -> Loaded {
    sources(&[], &[]).load_text(Some(text)).unwrap_or_else(|e| panic!("{e}"))
}

fn faults_of(sources: &Sources, text: &str) -> Vec<String> {
    match sources.load_text(Some(text)) {
        Err(Error::Config { faults }) => faults,
        other => panic!("expected faults, got {other:?}"),
    }
}

fn faults(text: &str) -> Vec<String> {
    faults_of(&sources(&[], &[]), text)
}

fn index(path: &str) -> usize {
    KEYS.iter().position(|key| key.path() == path).unwrap_or_else(|| panic!("no key {path}"))
}

#[test]
fn without_any_source_everything_is_the_default() {
    let loaded = Sources { file: None, ..Sources::default() }.load_text(None).expect("defaults are sound");
    assert_eq!(loaded.settings, Settings::default());
    assert!(loaded.origins.iter().all(|origin| *origin == Origin::Default));
    assert_eq!(loaded.settings.api.listen.to_string(), "127.0.0.1:8080");
    assert_eq!(loaded.settings.ai.max_queue_delay, Duration::ZERO);
}

#[test]
fn every_kind_of_value_is_read() {
    let loaded = load(
        r#"
        [api]
        listen = "localhost:9000"
        url = "https://models.example.com/base/"
        timeout = "1m 30s"
        max_body_bytes = "64KiB"
        [database]
        url = "mongodb://user:secret@a:27017,b:27018/?w=majority"
        path = "/var/lib/eremois"
        replica_set = "rs0"
        [cache]
        url = "rediss://cache:6380/2"
        ttl = "0s"
        [jobs]
        max_concurrency = 2
        lease = "1m"
        [ai]
        models = ["a", "b@2"]
        device = "cpu"
        max_batch_size = 8
        [log]
        format = "json"
        filter = "warn,eremois::serve=debug"
        "#,
    );
    let Settings { api, database, cache, jobs, ai, log } = loaded.settings;
    assert_eq!(api.listen.to_string(), "127.0.0.1:9000");
    assert_eq!(api.url.expect("set").0, "https://models.example.com/base");
    assert_eq!(api.timeout, Duration::from_secs(90));
    assert_eq!(api.max_body_bytes.0, 65536);
    assert!(matches!(database.url, eremois::config::words::DatabaseUrl::Mongo(ref url) if url.contains("secret")));
    assert_eq!(database.path, PathBuf::from("/var/lib/eremois"));
    assert_eq!(database.replica_set.as_deref(), Some("rs0"));
    assert!(matches!(cache.url, eremois::config::words::CacheUrl::Redis(_)));
    assert_eq!(cache.ttl, Duration::ZERO);
    assert_eq!((jobs.max_concurrency, jobs.lease), (2, Duration::from_secs(60)));
    assert_eq!(ai.models, ["a", "b@2"]);
    assert_eq!(ai.limits().max_batch_size, 8);
    assert_eq!(log.filter.0, "warn,eremois::serve=debug");
}

#[test]
fn later_sources_win_and_are_remembered() {
    let text = "[ai]\nmax_batch_size = 1\nmax_batch_tokens = 1000\nmax_queue_size = 3000\n";
    let environment = [("EREMOIS_AI__MAX_BATCH_TOKENS", "2000"), ("EREMOIS_AI__MAX_QUEUE_SIZE", "4000")];
    let loaded = sources(&environment, &["ai.max_queue_size=5000"]).load_text(Some(text)).expect("sound");
    let ai = &loaded.settings.ai;
    assert_eq!((ai.max_batch_size, ai.max_batch_tokens, ai.max_queue_size), (1, 2000, 5000));
    let file = Origin::File { path: "eremois.toml".into(), line: 2 };
    assert_eq!(loaded.origins[index("ai.max_batch_size")], file);
    let variable = Origin::Environment("EREMOIS_AI__MAX_BATCH_TOKENS".to_string());
    assert_eq!(loaded.origins[index("ai.max_batch_tokens")], variable);
    assert_eq!(loaded.origins[index("ai.max_queue_size")], Origin::CommandLine);
}

#[test]
fn variables_take_numbers_lists_and_aliases() {
    let environment =
        [("EREMOIS_AI__MODELS", "a, b,"), ("EREMOIS_AI__BATCH_SIZE", " 7 "), ("EREMOIS_API__LISTEN", "0.0.0.0:0")];
    let settings = sources(&environment, &[]).load_text(None).expect("sound").settings;
    assert_eq!(settings.ai.models, ["a", "b"]);
    assert_eq!(settings.ai.max_batch_size, 7);
    assert_eq!(settings.api.listen.to_string(), "0.0.0.0:0");
}

#[test]
fn all_faults_come_at_once_with_file_and_line() {
    let text =
        "[api]\nlisen = \"x\"\ntimeout = 5\n[aii]\n[ai]\nmax_batch_size = 0\nmodels = [1]\n[log]\nformat = true\n";
    let environment = [("EREMOIS_API__LISTEN", "nowhere"), ("EREMOIS_AI__BACH_SIZE", "3")];
    let got = faults_of(&sources(&environment, &["api.timeuot=1s", "nonsense"]), text);
    let expected = [
        "eremois.toml:2: api.lisen: unknown key; did you mean listen?",
        "eremois.toml:3: api.timeout: expected a duration such as 500ms, 30s or 2m, got 5",
        "eremois.toml:4: unknown section [aii]; did you mean ai?",
        "eremois.toml:6: ai.max_batch_size: expected a whole number from 1 to 1000000000, got 0",
        "eremois.toml:7: ai.models: expected an array of strings, got an array",
        "eremois.toml:9: log.format: expected human or json, got a boolean",
        "EREMOIS_API__LISTEN: expected an address and port such as 127.0.0.1:8080, got \"nowhere\"",
        "EREMOIS_AI__BACH_SIZE: unknown variable; did you mean EREMOIS_AI__MAX_BATCH_SIZE?",
        "--set: api.timeuot: unknown key; did you mean api.timeout?",
        "--set: expected SECTION.KEY=VALUE, got \"nonsense\"",
    ];
    assert_eq!(got, expected);
}

/// Each a settings file with one fault, and a piece of what is said about it.
#[test]
fn every_kind_of_wrong_value_is_named() {
    let cases = [
        ("[api]\nlisten = \"8080\"", "api.listen: expected an address"),
        ("[api]\nlisten = \"example.com:80\"", "api.listen: expected an address"),
        ("[api]\ngrpc_listen = \"127.0.0.1:8080\"", "api.grpc_listen: 127.0.0.1:8080 is already api.listen"),
        ("[api]\nurl = \"ftp://x\"", "api.url: expected an http:// or https:// address"),
        ("[api]\nurl = \"models\"", "api.url: expected an http:// or https:// address"),
        ("[api]\nversion = \"v2\"", "api.version: this server speaks v1"),
        ("[api]\ntimeout = \"0s\"", "api.timeout: must be longer than 0s"),
        ("[api]\ntimeout = \"-1s\"", "api.timeout: expected a duration"),
        ("[api]\nmax_body_bytes = 0", "api.max_body_bytes: must be between 1 B and 1024 GiB"),
        ("[api]\nmax_body_bytes = -1", "api.max_body_bytes: expected a number of bytes"),
        ("[api]\nmax_body_bytes = \"2 parsecs\"", "api.max_body_bytes: expected a number of bytes"),
        ("[api]\nmax_body_bytes = \"99999999999999999999GiB\"", "api.max_body_bytes: expected a number of bytes"),
        ("[api]\nmax_client_batch_size = 5000", "5000 inputs never fit into a queue of ai.max_queue_size = 4096"),
        ("[database]\nurl = \"postgres://x\"", "database.url: expected `embedded`, or mongodb://"),
        ("[database]\nurl = \"mongodb://\"", "database.url: expected `embedded`, or mongodb://"),
        ("[jobs]\nlease = \"999ms\"", "jobs.lease: must be at least 1s"),
        ("[database]\nreplica_set = \"rs\"", "database.replica_set: needs a MongoDB database.url"),
        ("[database]\npath = \"\"", "database.path: must not be empty"),
        (
            "[database]\npool_size = 1.5",
            "database.pool_size: expected a whole number from 1 to 1000000000, got a float",
        ),
        ("[database]\npool_size = \"4\"", "database.pool_size: expected a whole number"),
        ("[cache]\nurl = \"redis://\"", "cache.url: expected `memory`, or redis://"),
        ("[ai]\nmodels = \"a\"", "ai.models: expected an array of strings"),
        ("[ai]\nmodels = [\"\"]", "ai.models: item 0 is empty"),
        ("[ai]\nmodels = [\"a\", \"a\"]", "ai.models: \"a\" is named twice"),
        ("[ai]\ndevice = \"gpu\"", "ai.device: expected auto, cpu, cuda or cuda:N,N"),
        ("[ai]\ndevice = \"cuda:0,0\"", "ai.device: "),
        ("[ai]\nmax_batch_tokens = 99999999999999999999", "ai.max_batch_tokens: expected a whole number"),
        ("[ai]\nmax_queue_delay = \"soon\"", "ai.max_queue_delay: expected a duration"),
        (
            "[ai]\nmax_queue_delay = 2020-01-01",
            "ai.max_queue_delay: expected a duration such as 500ms, 30s or 2m, got a date",
        ),
        ("[ai]\ndevice_timeout = \"0s\"", "ai.device_timeout: must be longer than 0s"),
        ("[ai]\nheartbeat_interval = \"0s\"", "ai.heartbeat_interval: must be longer than 0s"),
        ("[ai]\nbatch_size = 1\nmax_batch_size = 2", "the same setting as ai.batch_size"),
        ("[log]\nfilter = \"loud\"", "log.filter: expected a level"),
        ("[log]\nfilter = \"eremois=loud\"", "log.filter: expected a level"),
        ("[log]\nformat = \"xml\"", "log.format: expected human or json"),
        ("[ai]\ntimeout = \"1s\"", "ai.timeout: unknown key; did you mean api.timeout?"),
        ("listen = \"127.0.0.1:1\"", "listen: a key outside its section; it belongs under [api]"),
        ("ai = 3", "ai: a section, written [ai], not a key"),
        ("zebra = 3", "zebra: unknown key outside any section"),
        ("[api\n", "not TOML"),
        ("[api]\nlisten = \n", "eremois.toml:2: not TOML"),
        ("[api]\ntimeout = \"1s\"\ntimeout = \"2s\"", "eremois.toml:3: not TOML"),
    ];
    for (text, expected) in cases {
        let got = faults(text);
        assert!(got.len() == 1 || text == "[api\n", "{text:?} gave {got:?}");
        assert!(got.iter().any(|fault| fault.contains(expected)), "{text:?} gave {got:?}, expected {expected:?}");
        assert!(
            got.iter().all(|fault| fault.starts_with("eremois.toml:") || fault.starts_with("the default:")),
            "{got:?}"
        );
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_by_name_needs_a_build_with_it() {
    assert!(faults("[ai]\ndevice = \"cuda:1\"")[0].contains("needs a build with the feature `cuda`"));
}

#[test]
fn foreign_variables_are_left_alone() {
    let environment = [
        ("EREMOIS_CONFIG", "x"),
        ("EREMOIS_TEST_CACHE", "x"),
        ("EREMOIS_PORT", "tcp://10.0.0.1:80"),
        ("EREMOIS_PORT_80_TCP_ADDR", "10.0.0.1"),
        ("EREMOIS_SERVICE_HOST", "10.0.0.1"),
        ("PATH", "/bin"),
    ];
    assert!(sources(&environment, &[]).load_text(None).is_ok());
    // One underscore too few is the likeliest slip of all.
    let slip = faults_of(&sources(&[("EREMOIS_API_LISTEN", "127.0.0.1:1")], &[]), "");
    assert_eq!(slip, ["EREMOIS_API_LISTEN: unknown variable; did you mean EREMOIS_API__LISTEN?"]);
}

#[test]
fn the_hub_is_the_setting_then_the_variable() {
    let environment = [("HF_ENDPOINT", "http://mirror"), ("HF_TOKEN", "hf_secret")];
    let hub = sources(&environment, &[]).load_text(None).expect("sound").hub;
    assert_eq!((hub.endpoint.as_deref(), hub.token.as_deref()), (Some("http://mirror"), Some("hf_secret")));
    assert!(!format!("{hub:?}").contains("hf_secret"));
    let text = "[ai]\nmodel_endpoint = \"http://ours/\"\n";
    let hub = sources(&environment, &[]).load_text(Some(text)).expect("sound").hub;
    assert_eq!(hub.endpoint.as_deref(), Some("http://ours"));
    assert_eq!(sources(&[], &[]).load_text(None).expect("sound").hub, Default::default());
}

#[test]
fn a_named_file_must_exist_and_the_default_one_need_not() {
    let missing = Sources { file: Some("/nonexistent/eremois.toml".into()), ..Sources::default() };
    let fault = missing.load().expect_err("there is no such file").to_string();
    assert!(fault.starts_with("/nonexistent/eremois.toml: "), "{fault}");
}

#[test]
fn what_show_prints_reads_back_as_the_same_settings() {
    let text = "[api]\nlisten = \"[::1]:80\"\nmax_body_bytes = 1000\n[ai]\nmodels = [\"a \\\"quoted\\\" \\\\ name\"]\n\
                max_queue_delay = \"1ms 500us\"\n[log]\nformat = \"json\"\n";
    let loaded = load(text);
    let shown = show::toml(&loaded);
    let again = load(&shown);
    assert_eq!(again.settings, loaded.settings, "{shown}");
    assert!(shown.contains("listen = \"[::1]:80\"  # from eremois.toml:2"), "{shown}");
    for key in KEYS {
        assert!(shown.contains(&format!("\n{} = ", key.name)), "{} is not shown", key.path());
    }
}

#[test]
fn passwords_are_never_shown() {
    let text = "[database]\nurl = \"mongodb://user:s3cr@t@a:1,b:2/db\"\n[cache]\nurl = \"redis://:s3cret@host/0\"\n";
    let loaded = load(text);
    let shown = show::toml(&loaded);
    assert!(shown.contains("mongodb://user:***@a:1,b:2/db"), "{shown}");
    assert!(shown.contains("redis://:***@host:6379"), "{shown}");
    assert!(!format!("{shown} {loaded:?}").contains("s3cr"), "{loaded:?}");
    // Faults repeat what was typed, but not this.
    assert!(!faults("[database]\nurl = \"postgres://user:s3cret@a\"")[0].contains("s3cret"));
}

#[test]
fn changes_name_what_differs() {
    let old = Settings::default();
    let new = load("[ai]\nmax_batch_size = 8\n[api]\ntimeout = \"1s\"\n").settings;
    let changes = changes(&old, &new);
    let seen: Vec<_> = changes.iter().map(|c| (c.key.path(), c.is_live(), c.old.as_str(), c.new.as_str())).collect();
    let expected =
        [("api.timeout".to_string(), false, "\"30s\"", "\"1s\""), ("ai.max_batch_size".to_string(), true, "32", "8")];
    assert_eq!(seen, expected);
}

/// The structs and the table cannot drift apart: every field of every section is a key, and the other way.
#[test]
fn every_field_is_a_key_and_every_key_is_documented() {
    let debug = format!("{:#?}", Settings::default());
    let field = |line: &str| {
        let name = line.strip_prefix("        ")?.split_once(": ")?.0;
        name.chars().all(|c| c.is_ascii_lowercase() || c == '_').then(|| name.to_string())
    };
    let mut fields: Vec<String> = debug.lines().filter_map(field).collect();
    let mut names: Vec<String> = KEYS.iter().map(|key| key.name.to_string()).collect();
    fields.sort();
    names.sort();
    assert_eq!(fields, names, "{debug}");
    for key in KEYS {
        assert!(SECTIONS.iter().any(|(section, _)| *section == key.section), "{} has no section", key.path());
        assert!(key.doc.ends_with('.'), "{}: the text is no sentence", key.path());
    }
    let mut paths: Vec<String> = KEYS.iter().map(|key| key.path()).collect();
    paths.sort();
    paths.dedup();
    assert_eq!(paths.len(), KEYS.len(), "a key stands twice");
}

/// Every accessor leads to its own field: setting one key changes that key and no other.
#[test]
fn every_key_reads_and_writes_its_own_field() {
    for key in KEYS {
        let value = match (key.field)(&mut Settings::default()).form() {
            form if form.starts_with("an address") => "127.0.0.1:1234",
            form if form.starts_with("an http") => "http://example.com",
            form if form.starts_with("a duration") => "1s 1ms",
            form if form.starts_with("a number of bytes") => "17",
            form if form.starts_with("a whole number") => "2222",
            form if form.starts_with("an array") => "x,y",
            form if form.starts_with("a path") || form.starts_with("a name") => "something",
            form if form.starts_with("`embedded`") => "mongodb://host",
            form if form.starts_with("`memory`") => "redis://host",
            form if form.starts_with("auto") => "cpu",
            form if form.starts_with("human") => "json",
            form if form.starts_with("settings") => "explicit",
            form if form.starts_with("application") => "all",
            form if form.starts_with("full") => "hash",
            form if form.starts_with("a level") => "debug",
            form if form.starts_with("`whsec_`") => "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            form if form.starts_with("networks") => "10.0.0.0/8, ::1",
            // The only value there is.
            "v1" => continue,
            form => panic!("{}: no value for {form:?} in this test", key.path()),
        };
        // A replica set alone is a contradiction.
        let extra: &[&str] = if key.name == "replica_set" { &["database.url=mongodb://host"] } else { &[] };
        let assignment = format!("{}={value}", key.path());
        let set: Vec<&str> = extra.iter().copied().chain([assignment.as_str()]).collect();
        let loaded = sources(&[], &set).load_text(None).unwrap_or_else(|e| panic!("{assignment}: {e}"));
        let changed: Vec<String> =
            changes(&Settings::default(), &loaded.settings).iter().map(|c| c.key.path()).collect();
        let mut expected = vec![key.path()];
        if key.name == "replica_set" {
            expected.insert(0, "database.url".to_string());
        }
        assert_eq!(changed, expected);
    }
}

#[test]
fn docs_are_in_step_with_the_table() {
    let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/config.md")).expect("docs/config.md");
    let marker = "tests/config.rs holds it to that. -->\n\n";
    let (_, reference) = docs.split_once(marker).expect("docs/config.md has the marker");
    let made = show::markdown();
    let differs = reference.lines().zip(made.lines()).find(|(docs, made)| docs != made);
    assert_eq!(differs, None, "run: eremois config reference, and put its output below the marker");
    assert_eq!(reference.len(), made.len(), "docs/config.md is cut short or has more below its end");
}

#[test]
fn suggestions_need_likeness() {
    let known = || ["listen".to_string(), "timeout".to_string()].into_iter();
    assert_eq!(suggest("Listn", known()), "; did you mean listen?");
    assert_eq!(suggest("colour", known()), "");
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// No file and no value makes reading panic, and a fault always says where it is.
        #[test]
        fn reading_never_panics(text in "(\\[(api|ai|log|x)\\]\n|[a-z_]{1,8} ?= ?[\"a-z0-9\\[\\]{}.\\-]{0,12}\n|\\PC{0,20}\n){0,12}", value in "\\PC{0,24}") {
            if let Err(Error::Config { faults }) = sources(&[], &[]).load_text(Some(&text)) {
                prop_assert!(faults.iter().all(|fault| fault.contains(": ")), "{:?}", faults);
            }
            for key in KEYS {
                let _ = sources(&[(&key.variable(), &value)], &[]).load_text(None);
            }
        }

        /// A duration, a size and a list read back as written.
        #[test]
        fn values_survive_being_shown(us in 1u64..10_000_000_000, bytes in 1usize..1 << 40, models in prop::collection::hash_set("[^\\p{C}\\p{Z},]{1,12}", 0..4)) {
            let mut settings = Settings::default();
            settings.api.timeout = Duration::from_micros(us);
            settings.api.max_body_bytes.0 = bytes;
            settings.ai.models = models.into_iter().collect();
            let shown = show::toml(&Loaded { settings: settings.clone(), origins: vec![Origin::Default; KEYS.len()], hub: Default::default() });
            prop_assert_eq!(load(&shown).settings, settings);
        }
    }
}
