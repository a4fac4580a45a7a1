//! A block device, or a file of a fixed size, in place of a directory: no file system, no names, nothing to rename.
//!
//! ```text
//! 0          superblock, and again at 4096: where the regions are; written once
//! 8192       region 0      end mark (one sector) | 4096: a backup file, as in a directory
//! …          regions 1, 2  the same
//! ```
//! There are three regions: the file in use, the checkpoint that is to take its place, and, after a reset, the one of the
//! generation before. Checkpoints so alternate between regions; each has its journal behind it.
//!
//! # What is flushed, and when
//! 1. *Writing a file*: the header of a free region is zeros, durably so, before anything else is written there. The file
//!    goes in without its header, which is kept in memory, then the end mark, then a flush.
//! 2. *Publishing* (what a rename is elsewhere): the header is written and flushed. From then on the region is a file. It is
//!    one write of two copies with a checksum each: torn, there is no file, and the one before still counts.
//! 3. *The file it replaces* then loses its header, and with it the sealed data key, and the flush after that frees its
//!    region. A power cut in between leaves two files of one generation: the later checkpoint counts, and the next start
//!    removes the other one.
//! 4. *Commit*: frames behind the last ones, the end mark, one flush.
//!
//! The end mark says how long the file is, because what is behind it is left over from files before. It is a hint: without an
//! intact one all of the region is read, and what is left over opens with no key.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::format::{Fields, HEADER_LEN, checksum, headers};
use crate::storage::{MAX_FILE, SUFFIX, Storage, StorageFile, lock};
use crate::store::file_name;

/// Files that there is room for.
pub const REGIONS: usize = 3;
/// Smallest device: below it there is no room for a hundred IKE SAs.
pub const SMALLEST: u64 = 256 << 10;

/// What is written at once on any disk of today; each thing that is to survive the others is in a block of its own.
const BLOCK_LEN: usize = 4096;
const BLOCK: u64 = 4096;
const SECTOR: usize = 512;
/// Where the first region is.
const FIRST: u64 = 2 * BLOCK;
/// So much of a device has to be zeros before it is taken for an empty one.
const BLANK: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"PSTRNDEV";
const MARK: [u8; 8] = *b"PSTRNEND";
const VERSION: u64 = 1;

/// Numbered bytes that can be flushed.
pub trait Blocks: Send + Sync {
    /// How many there are.
    fn size(&self) -> io::Result<u64>;
    /// Those from `at` on; fewer only at the end.
    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize>;
    /// Writes over those from `at` on. After an error, how many were is unknown.
    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written durable.
    fn sync(&self) -> io::Result<()>;
}

impl Blocks for File {
    fn size(&self) -> io::Result<u64> {
        // The metadata of a block device say nothing of its size.
        (&mut &*self).seek(SeekFrom::End(0))
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match FileExt::read_at(self, rest, at + u64_of(done)) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// A device that backups are written to, owned by one process at a time.
pub struct Device(Arc<Shared>);

struct Shared {
    blocks: Box<dyn Blocks>,
    layout: Layout,
    regions: Mutex<[Region; REGIONS]>,
}

/// Where regions are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// Bytes of a region.
    region: u64,
}

/// What a region is used for.
#[derive(Clone, Debug, Default)]
struct Region {
    /// Of the file in it; `None`: it is free.
    name: Option<String>,
    /// Counts its files: a handle of one before does nothing.
    life: u64,
    /// The header of a file that is not published.
    header: Vec<u8>,
    /// There may be a header on the medium.
    dirty: bool,
    /// It takes the place of the file in this region when the next flush says so.
    replaces: Option<usize>,
    /// It was published and not flushed.
    fresh: bool,
}

impl Device {
    /// Opens a block device or a file of a fixed size for writing. One that is empty is taken into use.
    ///
    /// # Errors
    /// Another process has it, it is too small, or there is something else on it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let is_block_device = std::fs::metadata(path)?.file_type().is_block_device();
        // Of a block device: fails while it is mounted.
        let exclusive = if is_block_device { OFlags::EXCL } else { OFlags::empty() };
        let flags = i32::try_from(exclusive.bits()).unwrap_or_default();
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        lock(&file)?;
        if !is_block_device {
            // A file with holes would run out of room at a write that replaces something.
            match fallocate(&file, FallocateFlags::KEEP_SIZE, 0, file.metadata()?.len().max(1)) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Self::open_in(Box::new(file))
    }

    /// [`Device::open`] of any blocks.
    ///
    /// # Errors
    /// As there.
    pub fn open_in(blocks: Box<dyn Blocks>) -> io::Result<Self> {
        let layout = match Layout::find(blocks.as_ref())? {
            Found::Layout { layout, whole: true } => layout,
            Found::Layout { layout, whole: false } => {
                layout.write(blocks.as_ref())?;
                layout
            }
            Found::Blank(layout) => {
                for region in 0..REGIONS {
                    layout.clear(blocks.as_ref(), region)?;
                }
                blocks.sync()?;
                layout.write(blocks.as_ref())?;
                layout
            }
            Found::Other => {
                let text = "there is something else on it: if it may go, write zeros over the first 64 KiB";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        };
        let mut regions: [Region; REGIONS] = Default::default();
        // What is in a region without a file is not known.
        for region in &mut regions {
            region.dirty = true;
        }
        let mut files = layout.files(blocks.as_ref())?;
        // Of two files of one generation the later one was published, and the other was to be removed.
        files.sort_by_key(|file| file.epoch);
        let mut late = Vec::new();
        for OnDevice { region, name, .. } in files {
            if let Some((before, other)) = named(&mut regions, &name) {
                other.name = None;
                late.push(before);
            }
            if let Some(region) = regions.get_mut(region) {
                region.name = Some(name);
            }
        }
        let device = Self(Arc::new(Shared { blocks, layout, regions: Mutex::new(regions) }));
        let mut regions = device.0.regions();
        for number in late {
            if let Some(region) = regions.get_mut(number) {
                device.0.empty(number, region)?;
            }
        }
        drop(regions);
        Ok(device)
    }

    /// The files on blocks that someone else may be writing to, by name.
    pub(crate) fn read_files(blocks: &dyn Blocks) -> io::Result<Vec<(String, io::Result<Vec<u8>>)>> {
        let layout = match Layout::find(blocks)? {
            Found::Layout { layout, .. } => layout,
            Found::Blank(_) => return Ok(Vec::new()),
            Found::Other => {
                let text = "there is no backup on it, and it is not empty";
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        };
        let mut files = layout.files(blocks)?;
        files.sort_by(|a, b| (&a.name, a.epoch).cmp(&(&b.name, b.epoch)));
        let mut read = Vec::<(String, io::Result<Vec<u8>>)>::new();
        for file in files {
            let twice = read.iter().any(|(name, _)| *name == file.name);
            let name =
                if twice { format!("{}-region-{}{SUFFIX}", file.name, file.region) } else { file.name };
            read.push((name, layout.read(blocks, file.region)));
        }
        Ok(read)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(&self.0.layout).finish()
    }
}

/// What is on a device.
enum Found {
    /// Backups. Not `whole`: the superblock is damaged.
    Layout { layout: Layout, whole: bool },
    /// Nothing.
    Blank(Layout),
    /// Something else.
    Other,
}

/// A file in a region, as its header has it.
struct OnDevice {
    region: usize,
    name: String,
    generation: u64,
    epoch: u64,
    floor: u64,
}

impl OnDevice {
    /// Its header is, in both copies; perhaps the power went when it was published.
    const fn is_damaged(&self) -> bool {
        self.generation == u64::MAX
    }
}

impl Layout {
    /// That of a device of this size that is taken into use.
    fn of(size: u64) -> Self {
        let region = size.saturating_sub(FIRST) / u64_of(REGIONS);
        Self { region: region.min(MAX_FILE) / BLOCK * BLOCK }
    }

    fn find(blocks: &dyn Blocks) -> io::Result<Found> {
        let size = blocks.size()?;
        if size < SMALLEST {
            let text = format!("it has {size} bytes; {SMALLEST} is the least");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut first = vec![0; BLANK];
        blocks.read_at(0, &mut first)?;
        let copies = [0, BLOCK].map(|at| {
            let copy = first.get(usize::try_from(at).ok()?..)?;
            let (covered, stated) = copy.get(..32)?.split_at_checked(24)?;
            let numbers: Vec<_> = covered.chunks_exact(8).filter_map(|chunk| chunk.first_chunk()).collect();
            let [magic, version, region] = *numbers else { return None };
            let known =
                *magic == MAGIC && u64::from_be_bytes(*version) == VERSION && *stated == checksum(covered);
            let layout = Self { region: u64::from_be_bytes(*region) };
            (known && layout.fits(size)).then_some(layout)
        });
        let whole = copies.iter().all(Option::is_some);
        if let Some(layout) = copies.into_iter().flatten().next() {
            return Ok(Found::Layout { layout, whole });
        }
        let layout = Self::of(size);
        // The power may have gone while the superblock was first written.
        let copy = layout.superblock();
        let is_ours = |at: usize, byte: &u8| u64_of(at) < FIRST && copy.get(at % BLOCK_LEN) == Some(byte);
        let blank = first.iter().enumerate().all(|(at, byte)| *byte == 0 || is_ours(at, byte));
        Ok(if blank {
            Found::Blank(layout)
        } else if layout.has_backup(blocks)? {
            Found::Layout { layout, whole: false }
        } else {
            Found::Other
        })
    }

    fn fits(self, size: u64) -> bool {
        let regions = self.region.checked_mul(u64_of(REGIONS)).and_then(|all| all.checked_add(FIRST));
        self.region > BLOCK && self.region <= MAX_FILE && regions.is_some_and(|end| end <= size)
    }

    fn superblock(self) -> Vec<u8> {
        let mut copy = [MAGIC, VERSION.to_be_bytes(), self.region.to_be_bytes()].concat();
        copy.extend_from_slice(&checksum(&copy));
        copy.resize(SECTOR, 0);
        copy
    }

    fn write(self, blocks: &dyn Blocks) -> io::Result<()> {
        let copy = self.superblock();
        // One after the other: at no time is there none.
        for at in [0, BLOCK] {
            blocks.write_at(at, &copy)?;
            blocks.sync()?;
        }
        Ok(())
    }

    fn start(self, region: usize) -> u64 {
        FIRST + u64_of(region) * self.region
    }

    /// Bytes that a file may have.
    const fn capacity(self) -> u64 {
        self.region - BLOCK
    }

    fn has_backup(self, blocks: &dyn Blocks) -> io::Result<bool> {
        Ok(self.files(blocks)?.iter().any(|file| !file.is_damaged()))
    }

    /// What is in the regions, by their headers.
    fn files(self, blocks: &dyn Blocks) -> io::Result<Vec<OnDevice>> {
        let mut files = Vec::new();
        for region in 0..REGIONS {
            let mut header = [0; HEADER_LEN];
            blocks.read_at(self.start(region) + BLOCK, &mut header)?;
            if header.iter().all(|byte| *byte == 0) {
                continue;
            }
            let intact = headers(&header).ok().and_then(|copies| copies.first().map(|copy| copy.fields));
            files.push(match intact {
                Some(Fields { generation, epoch, floor, .. }) => {
                    OnDevice { region, name: file_name(generation), generation, epoch, floor }
                }
                // Damaged, or torn when it was published: to be reported, and removed in the end.
                None => OnDevice {
                    region,
                    name: format!("region-{region}{SUFFIX}"),
                    generation: u64::MAX,
                    epoch: 0,
                    floor: 0,
                },
            });
        }
        Ok(files)
    }

    /// The file in a region.
    fn read(self, blocks: &dyn Blocks, region: usize) -> io::Result<Vec<u8>> {
        let mut mark = [0; 24];
        blocks.read_at(self.start(region), &mut mark)?;
        let length = self.marked(&mark).unwrap_or_else(|| self.capacity());
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        let read = blocks.read_at(self.start(region) + BLOCK, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    fn marked(self, mark: &[u8; 24]) -> Option<u64> {
        let (covered, stated) = mark.split_at_checked(16)?;
        let length = u64::from_be_bytes(*covered.strip_prefix(&MARK)?.first_chunk()?);
        (*stated == checksum(covered) && length <= self.capacity()).then_some(length)
    }

    fn mark(self, blocks: &dyn Blocks, region: usize, length: u64) -> io::Result<()> {
        let mut mark = [MARK, length.to_be_bytes()].concat();
        mark.extend_from_slice(&checksum(&mark));
        mark.resize(SECTOR, 0);
        blocks.write_at(self.start(region), &mark)
    }

    /// Takes a region's header away.
    fn clear(self, blocks: &dyn Blocks, region: usize) -> io::Result<()> {
        blocks.write_at(self.start(region) + BLOCK, &[0; HEADER_LEN])
    }
}

impl Shared {
    fn regions(&self) -> MutexGuard<'_, [Region; REGIONS]> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a region's file, if there is one, worthless, durably.
    fn empty(&self, number: usize, region: &mut Region) -> io::Result<()> {
        if region.dirty {
            self.layout.clear(self.blocks.as_ref(), number)?;
            self.blocks.sync()?;
        }
        *region = Region { life: region.life, ..Region::default() };
        Ok(())
    }

    /// How many regions are free. If they are fewer than `wanted`, those of generations that do not count any more and
    /// could not be removed when they were to be are freed first, and those of what nobody can read.
    fn reclaim(&self, regions: &mut [Region; REGIONS], wanted: usize) -> io::Result<usize> {
        let count =
            |regions: &[Region; REGIONS]| regions.iter().filter(|region| region.name.is_none()).count();
        if count(regions) >= wanted {
            return Ok(count(regions));
        }
        let files = self.layout.files(self.blocks.as_ref())?;
        let floor = files.iter().map(|file| file.floor).max().unwrap_or_default();
        for file in files.iter().filter(|file| file.generation < floor || file.is_damaged()) {
            if let Some(region) = regions.get_mut(file.region) {
                self.empty(file.region, region)?;
            }
        }
        Ok(count(regions))
    }
}

fn named<'a>(regions: &'a mut [Region; REGIONS], name: &str) -> Option<(usize, &'a mut Region)> {
    regions.iter_mut().enumerate().find(|(_, region)| region.name.as_deref() == Some(name))
}

impl Storage for Device {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.regions().iter().filter_map(|region| region.name.clone()).collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let number = named(&mut self.0.regions(), name).map(|(number, _)| number);
        self.0.layout.read(self.0.blocks.as_ref(), number.ok_or(io::ErrorKind::NotFound)?)
    }

    fn create(&mut self, name: &str) -> io::Result<Box<dyn StorageFile>> {
        let shared = &self.0;
        let mut regions = shared.regions();
        if let Some((_, region)) = named(&mut regions, name) {
            region.name = None;
        }
        shared.reclaim(&mut regions, 1)?;
        let free = regions.iter_mut().enumerate().filter(|(_, region)| region.name.is_none());
        let (number, region) =
            free.min_by_key(|(_, region)| region.dirty).ok_or_else(|| full("no region is free"))?;
        shared.empty(number, region)?;
        region.name = Some(name.to_owned());
        region.life += 1;
        Ok(Box::new(InRegion { shared: Arc::clone(shared), number, life: region.life, at: 0 }))
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let shared = &self.0;
        let mut regions = shared.regions();
        let replaces = named(&mut regions, to).map(|(number, _)| number);
        let (number, region) = named(&mut regions, from).ok_or(io::ErrorKind::NotFound)?;
        region.dirty = true;
        shared.blocks.write_at(shared.layout.start(number) + BLOCK, &region.header)?;
        (region.name, region.replaces, region.fresh) = (Some(to.to_owned()), replaces, true);
        if let Some(replaced) = replaces.and_then(|number| regions.get_mut(number)) {
            replaced.name = None;
        }
        Ok(())
    }

    fn free(&mut self) -> io::Result<usize> {
        self.0.reclaim(&mut self.0.regions(), 2)
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut regions = self.0.regions();
        let (number, region) = named(&mut regions, name).ok_or(io::ErrorKind::NotFound)?;
        self.0.empty(number, region)
    }

    fn sync(&mut self) -> io::Result<()> {
        let shared = &self.0;
        let mut regions = shared.regions();
        let flushed = shared.blocks.sync();
        for number in 0..REGIONS {
            let Some(region) = regions.get_mut(number) else { continue };
            let Region { fresh: true, replaces, .. } = *region else { continue };
            (region.fresh, region.replaces) = (false, None);
            if flushed.is_err() {
                // It may be on the medium or not. What it was to replace is, and counts until something later is.
                let name = region.name.take();
                if let Some(before) = replaces.and_then(|before| regions.get_mut(before)) {
                    before.name = name;
                }
                continue;
            }
            // It has no name any more: an error here is tried again before the region is used, or at the next start.
            if let Some((before, region)) = replaces.and_then(|at| Some((at, regions.get_mut(at)?))) {
                let _ = shared.empty(before, region);
            }
        }
        flushed
    }
}

/// A file that is being written.
struct InRegion {
    shared: Arc<Shared>,
    number: usize,
    life: u64,
    at: u64,
}

impl InRegion {
    /// Whether the region is still this file's.
    fn is_current(&self, region: &Region) -> bool {
        region.life == self.life && region.name.is_some()
    }
}

impl StorageFile for InRegion {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let shared = &self.shared;
        if u64_of(bytes.len()) > self.room() {
            let capacity = shared.layout.capacity();
            return Err(full(&format!(
                "{capacity} bytes is what each of {REGIONS} regions has for a backup"
            )));
        }
        let mut regions = shared.regions();
        let region = regions.get_mut(self.number).filter(|region| self.is_current(region));
        let region = region.ok_or(io::ErrorKind::NotFound)?;
        // The header is kept back, whatever pieces it comes in.
        let mut rest = bytes;
        if let Some(missing) = HEADER_LEN.checked_sub(region.header.len()).filter(|missing| *missing > 0) {
            let (header, behind) = bytes.split_at_checked(missing).unwrap_or((bytes, &[]));
            region.header.extend_from_slice(header);
            rest = behind;
        }
        let begin = self.at + u64_of(bytes.len() - rest.len());
        self.at += u64_of(bytes.len());
        if rest.is_empty() {
            return Ok(());
        }
        shared.blocks.write_at(shared.layout.start(self.number) + BLOCK + begin, rest)
    }

    fn sync(&mut self) -> io::Result<()> {
        let regions = self.shared.regions();
        if !regions.get(self.number).is_some_and(|region| self.is_current(region)) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.shared.layout.mark(self.shared.blocks.as_ref(), self.number, self.at)?;
        self.shared.blocks.sync()
    }

    fn destroy_key(&mut self) -> io::Result<()> {
        let mut regions = self.shared.regions();
        match regions.get_mut(self.number) {
            Some(region) if self.is_current(region) => self.shared.empty(self.number, region),
            // It went when its successor was published.
            _ => Ok(()),
        }
    }

    fn room(&self) -> u64 {
        self.shared.layout.capacity().saturating_sub(self.at)
    }
}

fn full(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::StorageFull, text.to_owned())
}

/// Whether this is a block device, or a file that is used as one or may be because it is empty.
pub(crate) fn is_device(path: &Path) -> bool {
    let Ok(metadata) = std::fs::metadata(path) else { return false };
    if metadata.file_type().is_block_device() {
        return true;
    }
    let Ok(file) = File::open(path) else { return false };
    metadata.is_file()
        && metadata.len() >= SMALLEST
        && Layout::find(&file).is_ok_and(|found| !matches!(found, Found::Other))
}

/// A `usize` has at most 64 bits wherever this builds.
fn u64_of(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
