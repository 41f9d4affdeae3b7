"""Small trees in the layouts that data sets are published in, each with what should be protected in it."""

import json
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pycocotools import mask as coder
from scipy.io import savemat

HEIGHT, WIDTH = 40, 56
UPPER, LOWER = (slice(4, 18), slice(6, 30)), (slice(22, 36), slice(20, 50))


@dataclass
class Expected:
    """What should happen to an image: region of the full budget, number of segments, and the region of one class."""

    region: np.ndarray
    segments: int = 1
    of_class: tuple[str, np.ndarray] | None = None


def area(*places):
    region = np.zeros((HEIGHT, WIDTH), bool)
    for place in places:
        region[place] = True
    return region


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def photo(path, seed=None, grey=False):
    # Another one in each folder: what is the same in two splits is not published clean.
    seed = sum("/".join(path.parts[-3:]).encode()) % 7 if seed is None else seed
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([90 + y, 80 + x + seed, 170 - x], axis=-1).astype(np.uint8)
    save(path, pixels[:, :, 1] if grey else pixels, **({"quality": 95} if path.suffix == ".jpg" else {}))


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def labels(*parts, dtype=np.uint8):
    drawn = np.zeros((HEIGHT, WIDTH), dtype)
    for value, place in parts:
        drawn[place] = value
    return drawn


def palette(path, drawn):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(drawn, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


def voc2012(root, masks="SegmentationClass"):
    base = root / "VOCdevkit/VOC2012"
    for name in ("2007_000032", "2007_000033", "2008_000001"):
        photo(base / f"JPEGImages/{name}.jpg")
        text(base / f"Annotations/{name}.xml", "<annotation/>")
    border = (slice(3, 19), slice(5, 31))
    drawn = labels((255, border), (15, UPPER), (7, LOWER))
    for name in ("2007_000032", "2007_000033"):
        palette(base / f"{masks}/{name}.png", drawn)
        # Two objects of one class, side by side.
        halves = (1, (UPPER[0], slice(6, 18))), (2, (UPPER[0], slice(18, 30)))
        palette(base / f"SegmentationObject/{name}.png", labels((255, border), *halves, (3, LOWER)))
    sets = base / "ImageSets/Segmentation"
    text(sets / "train.txt", "2007_000032\n")
    text(sets / "val.txt", "2007_000033\n")
    text(sets / "trainval.txt", "2007_000032\n2007_000033\n")
    text(base / "ImageSets/Main/train.txt", "2008_000001\n")
    expected = Expected(area(UPPER, LOWER), 3, ("person", area(UPPER)))
    return {"VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg": expected}


def voc2012_augmented(root):
    return voc2012(root, "SegmentationClassAug")


def sbd(root):
    base = root / "benchmark_RELEASE/dataset"
    for name in ("2008_000002", "2008_000003"):
        photo(base / f"img/{name}.jpg")
        for folder, field, values in (("cls", "GTcls", (7, 15)), ("inst", "GTinst", (1, 2))):
            (base / folder).mkdir(exist_ok=True)
            drawn = labels((values[0], UPPER), (values[1], LOWER))
            content = {"Segmentation": drawn, "Boundaries": np.zeros((20, 1)), "Categories": np.array([[7], [15]])}
            savemat(base / f"{folder}/{name}.mat", {field: content})
    text(base / "train.txt", "2008_000002\n")
    text(base / "val.txt", "2008_000003\n")
    expected = Expected(area(UPPER, LOWER), 2, ("car", area(UPPER)))
    return {"benchmark_RELEASE/dataset/img/2008_000002.jpg": expected}


def ade20k(root):
    base = root / "ADEChallengeData2016"
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        photo(base / f"images/{split}/{name}.jpg")
        save(base / f"annotations/{split}/{name}.png", labels((15, UPPER), (150, LOWER)))
    text(
        base / "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n15\t0.02\t1\t1\t0\tdoor, double door\n150\t0.001\t1\t1\t0\tflag\n",
    )
    text(base / "sceneCategories.txt", "ADE_train_00000001 airport_terminal\n")
    expected = Expected(area(UPPER, LOWER), 2, ("double door", area(UPPER)))
    return {"ADEChallengeData2016/images/training/ADE_train_00000001.jpg": expected}


CATEGORIES = [{"id": 1, "name": "person", "isthing": 1}, {"id": 200, "name": "rug-merged", "isthing": 0}]
CROWD = (slice(0, 3), slice(40, 56))


def coco_panoptic(root, below=""):
    for split in ("train2017", "val2017"):
        photo(root / f"{split}/000000000009.jpg")
        numbers = labels((70000, UPPER), (300, LOWER), (9, CROWD), dtype=np.int32)
        colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
        save(root / f"{below}panoptic_{split}/000000000009.png", colours)
        segments = [
            {"id": 70000, "category_id": 1, "iscrowd": 0},
            {"id": 300, "category_id": 200, "iscrowd": 0},
            {"id": 9, "category_id": 1, "iscrowd": 1},
        ]
        content = {
            "images": [{"id": 9, "file_name": "000000000009.jpg", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{"image_id": 9, "file_name": "000000000009.png", "segments_info": segments}],
            "categories": CATEGORIES,
        }
        text(root / f"annotations/panoptic_{split}.json", content)
    photo(root / "test2017/000000000001.jpg")
    return {"train2017/000000000009.jpg": Expected(area(UPPER, LOWER), 2, ("person", area(UPPER)))}


def coco_panoptic_of_mmdetection(root):
    return coco_panoptic(root, "annotations/")


def polygon(place):
    (y0, y1), (x0, x1) = ((s.start, s.stop) for s in place)
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def compressed(place):
    code = coder.encode(np.asfortranarray(area(place).astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def uncompressed(place):
    runs, last, count = [], 0, 0
    for value in area(place).ravel(order="F").astype(int):
        if value != last:
            runs, last, count = [*runs, count], value, 0
        count += 1
    return {"size": [HEIGHT, WIDTH], "counts": [*runs, count]}


def instances(file_names, codes):
    return {
        "images": [{"id": i, "file_name": n, "height": HEIGHT, "width": WIDTH} for i, n in enumerate(file_names)],
        "annotations": [
            {"id": 10 * i + j, "image_id": i, "category_id": 1 + j % 2, "iscrowd": int(crowd), "segmentation": code}
            for i in range(len(file_names))
            for j, (code, crowd) in enumerate(codes)
        ],
        "categories": [{"id": 1, "name": "airplane"}, {"id": 2, "name": "ship"}],
    }


TWO = [(polygon(UPPER), False), (compressed(LOWER), False)]


def coco_instance(root):
    for split in ("train2017", "val2017"):
        photo(root / f"{split}/000000000009.jpg")
        objects = [(polygon(UPPER), False), (uncompressed(LOWER), False), (uncompressed(CROWD), True)]
        content = instances(["000000000009.jpg", "000000000010.jpg"], objects)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 0]
        text(root / f"annotations/instances_{split}.json", content)
    photo(root / "train2017/000000000010.jpg")
    expected = Expected(area(UPPER, LOWER), 2, ("airplane", area(UPPER)))
    # An image without objects gets the background's budget.
    return {"train2017/000000000009.jpg": expected, "train2017/000000000010.jpg": Expected(area())}


def cityscapes(root):
    group, void = (slice(0, 3), slice(0, 20)), (slice(37, 40), slice(0, 56))
    for place in ("train/aachen/aachen_000000_000019", "val/munster/munster_000000_000019"):
        photo(root / f"leftImg8bit/{place}_leftImg8bit.png")
        numbers = ((26001, UPPER), (7, LOWER), (26, group), (3, void))
        save(root / f"gtFine/{place}_gtFine_instanceIds.png", labels(*numbers, dtype=np.uint16))
        save(root / f"gtFine/{place}_gtFine_labelIds.png", labels((26, UPPER), (7, LOWER), (26, group), (3, void)))
        text(root / f"gtFine/{place}_gtFine_polygons.json", {"imgHeight": HEIGHT})
    photo(root / "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png")
    path = "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    return {path: Expected(area(UPPER, LOWER), 2, ("car", area(UPPER)))}


def hqseg44k(root):
    thin = "thin_object_detection"
    training = [(f"cascade_psp/{n}",) * 2 for n in ("DUTS-TE", "DUTS-TR", "MSRA_10K", "ecssd", "fss_all")]
    training += [("DIS5K/DIS-TR/im", "DIS5K/DIS-TR/gt")]
    training += [(f"{thin}/ThinObject5K/images_train", f"{thin}/ThinObject5K/masks_train")]
    tests = [("DIS5K/DIS-VD/im", "DIS5K/DIS-VD/gt"), (f"{thin}/COIFT/images", f"{thin}/COIFT/masks")]
    tests += [(f"{thin}/ThinObject5K/images_test", f"{thin}/ThinObject5K/masks_test")]
    tests += [(f"{thin}/HRSOD/images", f"{thin}/HRSOD/masks_max255")]
    edge = (slice(3, 4), slice(6, 30))
    for images, masks in training + tests:
        photo(root / images / "a.b.jpg")
        drawn = labels((255, UPPER), (100, edge))
        save(root / masks / "a.b.png", np.stack([drawn] * 3, axis=-1) if "DUTS" in masks else drawn)
    return {f"{images}/a.b.jpg": Expected(area(UPPER)) for images, _ in training}


def whu(root):
    for split in ("train", "val", "test"):
        photo(root / f"imgs/{split}/image/0.tif")
        save(root / f"imgs/{split}/label/0.tif", labels((255, UPPER), (255, LOWER)))
        text(root / f"annotations/WHU_building_{split}.json", instances(["0.tif"], TWO))
    return {"imgs/train/image/0.tif": Expected(area(UPPER, LOWER), 2)}


def whu_of_the_authors(root):
    for split in ("train", "val", "test"):
        photo(root / f"{split}/image/0.tif")
        save(root / f"{split}/label/0.tif", labels((255, UPPER)))
    return {"train/image/0.tif": Expected(area(UPPER))}


def rsprompter(name):
    def write(root):
        for number, split in enumerate(("train", "val"), start=1):
            photo(root / f"imgs/00{number}.jpg", grey=name == "SSDD")
            text(root / f"annotations/{name}_instances_{split}.json", instances([f"00{number}.jpg"], TWO))
        return {"imgs/001.jpg": Expected(area(UPPER, LOWER), 2, ("ship", area(LOWER)))}

    return write


def nwpu_of_the_annotators(root):
    base = root / "NWPU VHR-10_dataset_coco"
    photo(base / "positive image set/001.jpg")
    photo(base / "negative image set/001.jpg")
    text(base / "annotations.json", instances(["001.jpg"], TWO))
    expected = Expected(area(UPPER, LOWER), 2, ("ship", area(LOWER)))
    return {"NWPU VHR-10_dataset_coco/positive image set/001.jpg": expected}


def official_ssdd(root):
    base = root / "PSeg_SSDD/coco_style"
    for split in ("train", "test", "test_inshore"):
        photo(base / f"images/{split}/000001.jpg", grey=True)
        text(base / f"annotations/{split}.json", instances(["000001.jpg"], TWO))
    return {"PSeg_SSDD/coco_style/images/train/000001.jpg": Expected(area(UPPER, LOWER), 2)}


def lung_xray(root):
    base = root / "data/Lung Segmentation"
    for name, mask in (
        ("CHNCXR_0001_0", "CHNCXR_0001_0_mask"),
        ("MCUCXR_0001_0", "MCUCXR_0001_0"),
        ("CHNCXR_0025_0", None),
    ):
        photo(base / f"CXR_png/{name}.png", grey=True)
        text(base / f"ClinicalReadings/{name}.txt", "male 45yrs\n")
        if mask:
            save(base / f"masks/{mask}.png", labels((255, UPPER)))
    photo(base / "test/CHNCXR_0100_0.png", grey=True)
    names = ("CHNCXR_0001_0", "MCUCXR_0001_0")
    return {f"data/Lung Segmentation/CXR_png/{name}.png": Expected(area(UPPER)) for name in names}


def kvasir_seg(root):
    base, expected = root / "Kvasir-SEG", {}
    for name in ("cju0qkwl35piu0993l0dewei2", "cju0qoxqj9q6s0835b43399p4"):
        photo(base / f"images/{name}.jpg")
        mask = base / f"masks/{name}.jpg"
        save(mask, np.stack([labels((255, UPPER))] * 3, axis=-1), quality=75)
        expected[f"Kvasir-SEG/images/{name}.jpg"] = Expected(np.asarray(Image.open(mask).convert("L")) > 127)
    text(base / "kavsir_bboxes.json", {})
    return expected


TREES = {
    "voc2012": ("voc2012", voc2012),
    "voc2012, augmented": ("voc2012", voc2012_augmented),
    "sbd": ("sbd", sbd),
    "ade20k": ("ade20k", ade20k),
    "coco-panoptic": ("coco-panoptic", coco_panoptic),
    "coco-panoptic, mmdetection": ("coco-panoptic", coco_panoptic_of_mmdetection),
    "coco-instance": ("coco-instance", coco_instance),
    "cityscapes": ("cityscapes", cityscapes),
    "hqseg44k": ("hqseg44k", hqseg44k),
    "whu": ("whu", whu),
    "whu, authors": ("whu", whu_of_the_authors),
    "nwpu": ("nwpu", rsprompter("NWPU")),
    "nwpu, annotators": ("nwpu", nwpu_of_the_annotators),
    "ssdd": ("ssdd", rsprompter("SSDD")),
    "ssdd, official": ("ssdd", official_ssdd),
    "lung-xray": ("lung-xray", lung_xray),
    "kvasir-seg": ("kvasir-seg", kvasir_seg),
}
"""Name of the data set, and the function that writes a tree of it and returns what is expected of which image."""
