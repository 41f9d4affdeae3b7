"""The data sets: where their images and masks lie, which images are for training, and the budget they get.

In a path, `{name}` stands for what an image's file and its annotation share, and `{split}` for the name of a split.
"""

from dataclasses import dataclass

from unseg_hf.data.hqseg import PARTS, TRAINING_PARTS

from .annotations import BinaryMasks, CityscapesImages, Kind, LabelImages
from .coco import CocoInstances, CocoPanoptic

MEDICAL = 4.0
"""Grey levels inside the masks: structures in medical images are faint."""


@dataclass(frozen=True)
class Images:
    """A group of images that are annotated in the same way.

    Args:
        file: template of the image files.
        annotation: of the images.
        split: name of their split, where the path does not have it.
        listed: template of the text files that list the images of a split, a name a line.
    """

    file: str
    annotation: Kind
    split: str | None = None
    listed: str | None = None


@dataclass(frozen=True)
class Layout:
    """One layout of a data set.

    Args:
        images: groups of images; those of which there are none are left out.
        train: splits that are protected by default, as far as they are there.
        origin: where this layout is from.
        bases: folders below the root in which it may begin.
        labels: templates of further label images, which are copied though they are named as the images.
        others: templates of other pictures of which the same is true.
    """

    images: tuple[Images, ...]
    train: tuple[str, ...]
    origin: str
    bases: tuple[str, ...] = ("",)
    labels: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSet:
    """A data set.

    Args:
        title: its name in the literature.
        layouts: in which it is found; the first that fits a root counts.
        protects: what gets the full budget.
        epsilon: grey levels of 255 inside the masks by default; None is the generator's.
        unlabelled: images without masks belong to it, and are copied as they are.
        note: what a user should know.
    """

    title: str
    layouts: tuple[Layout, ...]
    protects: str
    epsilon: float | None = None
    unlabelled: bool = False
    note: str = ""


_VOC = dict(enumerate((
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
), start=1))  # fmt: skip
_CITYSCAPES_STUFF = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole"}
_CITYSCAPES_STUFF |= {19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky"}
_CITYSCAPES_THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train"}
_CITYSCAPES_THINGS |= {32: "motorcycle", 33: "bicycle"}
_COCO_TRAIN = ("train2017", "train2014")
_COCO_LABELS = ("panoptic_{split}/{name}.png", "annotations/{name}.png", "stuffthingmaps/{split}/{name}.png")
_RSPROMPTER = "the configurations of RSPrompter (KyanChen/RSPrompter)"

DATA_SETS: dict[str, DataSet] = {
    "voc2012": DataSet(
        "Pascal VOC 2012",
        (
            Layout(
                (
                    Images(
                        "JPEGImages/{name}.jpg",
                        LabelImages(
                            ("SegmentationClass/{name}.png", "SegmentationClassAug/{name}.png"),
                            objects="SegmentationObject/{name}.png",
                            named=_VOC,
                        ),
                        listed="ImageSets/Segmentation/{split}.txt",
                    ),
                ),
                ("train",),
                "the development kit, and mmsegmentation for SegmentationClassAug",
                ("", "VOC2012", "VOCdevkit/VOC2012"),
                labels=("SegmentationObject/{name}.png", "SegmentationClassRaw/{name}.png"),
            ),
        ),
        "labels but 0 and 255",
        note="--split trainaug for the augmented list, where it is there; images in no list are copied",
    ),
    "sbd": DataSet(
        "Semantic Boundaries Dataset",
        (
            Layout(
                (
                    Images(
                        "img/{name}.jpg",
                        LabelImages(("cls/{name}.mat",), objects="inst/{name}.mat", named=_VOC),
                        listed="{split}.txt",
                    ),
                ),
                ("train",),
                "benchmark_RELEASE of the authors, and mmsegmentation (VOCaug)",
                ("", "dataset", "benchmark_RELEASE/dataset"),
            ),
        ),
        "labels but 0 and 255",
        note="its train list has images of VOC 2012's val; --names takes another list",
    ),
    "ade20k": DataSet(
        "ADE20K, scene parsing (ADEChallengeData2016)",
        (
            Layout(
                (
                    Images(
                        "images/{split}/{name}.jpg",
                        LabelImages(("annotations/{split}/{name}.png",), ignored=(0,), named="objectInfo150.txt"),
                    ),
                ),
                ("training",),
                "ADEChallengeData2016.zip of the authors",
                ("", "ADEChallengeData2016"),
                labels=(
                    "annotations_detectron2/{split}/{name}.png",
                    "annotations_instance/{split}/{name}.png",
                    "ade20k_panoptic_{split}/{name}.png",
                ),
            ),
        ),
        "labels but 0, which training code maps to 255",
    ),
    "coco-panoptic": DataSet(
        "COCO, panoptic",
        (
            Layout(
                (
                    Images(
                        "{split}/{name}.jpg",
                        CocoPanoptic(
                            "annotations/panoptic_{split}.json",
                            ("panoptic_{split}", "annotations/panoptic_{split}"),
                        ),
                    ),
                ),
                _COCO_TRAIN,
                "cocodataset.org; the PNGs beside the images as in detectron2, or below annotations as in mmdetection",
                labels=_COCO_LABELS,
            ),
        ),
        "things and stuff, without crowds",
    ),
    "coco-instance": DataSet(
        "COCO, instances",
        (
            Layout(
                (Images("{split}/{name}.jpg", CocoInstances("annotations/instances_{split}.json")),),
                _COCO_TRAIN,
                "cocodataset.org",
                labels=_COCO_LABELS,
            ),
        ),
        "objects, without crowds; all of the box of one without a segmentation",
    ),
    "cityscapes": DataSet(
        "Cityscapes, fine annotations",
        (
            Layout(
                (
                    Images(
                        "leftImg8bit/{split}/{name}_leftImg8bit.png",
                        CityscapesImages(
                            ("gtFine/{split}/{name}_gtFine_instanceIds.png",), _CITYSCAPES_STUFF, _CITYSCAPES_THINGS
                        ),
                    ),
                ),
                ("train",),
                "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip",
                labels=("gtFine/{split}/{name}.png",),
            ),
        ),
        "the 19 evaluated classes, without groups of things",
    ),
    "hqseg44k": DataSet(
        "HQSeg-44K (DIS5K, ThinObject5K, COIFT, HRSOD, FSS-1000, DUTS, ECSSD, MSRA10K)",
        (
            Layout(
                tuple(
                    Images(f"{images}/{{name}}.jpg", BinaryMasks((f"{masks}/{{name}}.png",)), split=part)
                    for part, (images, masks) in PARTS.items()
                ),
                TRAINING_PARTS,
                "the archives of SAM-HQ (SysCV/sam-hq)",
            ),
        ),
        "the object",
        note="every part is a split: --split COIFT HRSOD",
    ),
    "whu": DataSet(
        "WHU buildings, aerial imagery",
        (
            Layout(
                (Images("imgs/{split}/image/{name}.tif", CocoInstances("annotations/WHU_building_{split}.json")),),
                ("train",),
                _RSPROMPTER,
                labels=("imgs/{split}/label/{name}.tif",),
            ),
            Layout(
                (Images("{split}/image/{name}.tif", BinaryMasks(("{split}/label/{name}.tif",))),),
                ("train",),
                "the authors' archive, 512 x 512 tiles",
                ("", "imgs"),
            ),
        ),
        "buildings",
    ),
    "nwpu": DataSet(
        "NWPU VHR-10, instances",
        (
            Layout(
                (Images("imgs/{name}.jpg", CocoInstances("annotations/NWPU_instances_{split}.json")),),
                ("train",),
                _RSPROMPTER,
            ),
            Layout(
                (Images("positive image set/{name}.jpg", CocoInstances("annotations.json"), split="all"),),
                ("all",),
                "chaozhong2010/VHR-10_dataset_coco",
                ("", "NWPU VHR-10_dataset_coco"),
                others=("negative image set/{name}.jpg",),
            ),
        ),
        "objects of the ten classes",
        note="the second layout has no splits: --names takes a training list",
    ),
    "ssdd": DataSet(
        "SSDD, ships in radar images",
        (
            Layout(
                (Images("imgs/{name}.jpg", CocoInstances("annotations/SSDD_instances_{split}.json")),),
                ("train",),
                _RSPROMPTER,
            ),
            Layout(
                (Images("images/{split}/{name}.jpg", CocoInstances("annotations/{split}.json")),),
                ("train",),
                "Official-SSDD-OPEN",
                ("", "coco_style", "PSeg_SSDD/coco_style"),
            ),
        ),
        "ships",
    ),
    "lung-xray": DataSet(
        "Chest X-ray masks and labels (Montgomery and Shenzhen)",
        (
            Layout(
                (
                    Images(
                        "CXR_png/{name}.png",
                        # Shenzhen's masks have the suffix, Montgomery's have none.
                        BinaryMasks(("masks/{name}_mask.png", "masks/{name}.png")),
                        split="all",
                    ),
                ),
                ("all",),
                "nikhilpandey360/chest-xray-masks-and-labels on Kaggle",
                ("", "Lung Segmentation", "data/Lung Segmentation"),
            ),
        ),
        "the lungs",
        MEDICAL,
        unlabelled=True,
        note="no published split: --names takes a training list; 96 of 800 images have no mask and are copied",
    ),
    "kvasir-seg": DataSet(
        "Kvasir-SEG, polyps",
        (
            Layout(
                (Images("images/{name}.jpg", BinaryMasks(("masks/{name}.jpg",)), split="all"),),
                ("all",),
                "kvasir-seg.zip of Simula",
                ("", "Kvasir-SEG"),
            ),
        ),
        "the polyp",
        MEDICAL,
        note="no split in the archive: --names takes a training list",
    ),
}
