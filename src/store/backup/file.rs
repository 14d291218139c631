//! The file of a backup: whole under its name, or not there.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use zstd::stream::read::Decoder;
use zstd::stream::write::Encoder;

use super::frame::{StreamReader, StreamWriter};
use super::key::{Key, Lock, Locked};
use super::seal::{Sealed, Sealing};
use super::{Footer, Header, fault};
use crate::{Error, Result};

/// zstd's own default: faster than most disks, and rows of floats compress little at any level.
const LEVEL: i32 = 3;

/// Bytes read and written at a time.
const BUFFER: usize = 256 << 10;

type Out = Encoder<'static, Sealing<Locked<BufWriter<File>>>>;

/// A backup that is being written, beside its place. Dropped unfinished, it is deleted.
pub struct NewFile {
    stream: Option<StreamWriter<Out>>,
    place: Place,
}

/// Where it is, and where it will be.
struct Place {
    out: PathBuf,
    unfinished: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        // Not there any more where it was finished.
        let _ = std::fs::remove_file(&self.unfinished);
    }
}

impl NewFile {
    /// Begins a backup that only this user can read. Blocks: with a passphrase for about a second.
    ///
    /// Errors: [`Error::Conflict`] where `out` is there already, [`Error::Backup`] where the folder cannot be written.
    pub fn create(out: &Path, lock: &Lock, header: &Header) -> Result<Self> {
        if out.symlink_metadata().is_ok() {
            let reason = format!("{} is there already", out.display());
            return Err(Error::Conflict { field: "--out".to_string(), reason });
        }
        let name = out.file_name().ok_or_else(|| fault(out, "it names no file"))?.to_string_lossy();
        let unfinished = out.with_file_name(format!(".{name}.{}.unfinished", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let file = file.map_err(|e| fault(&unfinished, e))?;
        let place = Place { out: out.to_path_buf(), unfinished };
        let begin = || -> io::Result<StreamWriter<Out>> {
            let locked = lock.wrap(BufWriter::with_capacity(BUFFER, file))?;
            let mut zstd = Encoder::new(Sealing::new(locked), LEVEL)?;
            zstd.include_checksum(true)?;
            StreamWriter::new(zstd, header)
        };
        let stream = begin().map_err(|e| fault(out, e))?;
        Ok(Self { stream: Some(stream), place })
    }

    /// Where sections are written. Errors of it are the disk's: see [`NewFile::fault`].
    pub fn stream(&mut self) -> &mut StreamWriter<impl Write + use<>> {
        self.stream.as_mut().expect("only finish takes it, and consumes this")
    }

    /// An error of the stream as one that names the file.
    pub fn fault(&self, error: io::Error) -> Error {
        fault(&self.place.out, error)
    }

    /// Ends it, makes it durable and puts it in its place. Returns its size in bytes.
    ///
    /// Errors: [`Error::Backup`].
    pub fn finish(mut self, footer: &Footer) -> Result<u64> {
        let stream = self.stream.take().expect("it is taken here alone");
        let Place { out, unfinished } = &self.place;
        let end = || -> io::Result<u64> {
            let file = stream.finish(footer)?.finish()?.finish()?.finish()?.into_inner().map_err(|e| e.into_error())?;
            file.sync_all()?;
            // Another may have come there in the meantime.
            if out.symlink_metadata().is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            std::fs::rename(unfinished, out)?;
            // The entry of a file is in its folder; "" is where we are.
            let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)?.sync_all()?;
            Ok(file.metadata()?.len())
        };
        end().map_err(|e| fault(out, e))
    }
}

/// Opens a backup. All of it is checked when its parts have been read to the end.
///
/// Blocks: with a passphrase for about a second.
/// Errors: [`Error::Backup`] saying what is wrong with the file or the key.
pub fn open(path: &Path, key: &Key) -> Result<StreamReader<impl Read + use<>>> {
    let open = || -> io::Result<_> {
        let content = key.open(BufReader::with_capacity(BUFFER, File::open(path)?))?;
        let sealed = BufReader::with_capacity(BUFFER, Sealed::new(content));
        StreamReader::new(Whole::new(Decoder::with_buffer(sealed)?.single_frame()))
    };
    open().map_err(|e| fault(path, read_error(e)))
}

/// An error of reading, in words that say what it means of a backup.
pub(super) fn read_error(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut off".to_string(),
        _ => error.to_string(),
    }
}

/// Reads a frame of zstd, and at its end all that follows: the layers below check themselves there.
struct Whole<R: io::BufRead> {
    /// `None` after the end.
    decoder: Option<Decoder<'static, R>>,
}

impl<R: io::BufRead> Whole<R> {
    fn new(decoder: Decoder<'static, R>) -> Self {
        Self { decoder: Some(decoder) }
    }
}

impl<R: io::BufRead> Read for Whole<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(decoder) = &mut self.decoder else { return Ok(0) };
        let len = decoder.read(out)?;
        if len == 0
            && !out.is_empty()
            && let Some(decoder) = self.decoder.take()
            && !decoder.finish().fill_buf()?.is_empty()
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "something follows its end"));
        }
        Ok(len)
    }
}
